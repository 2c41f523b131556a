"""PyTorch's own wheels: builds such as 2.13.0+cpu, which lie in an index or on a page of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from provision.installers import pip_settings
from provision.mirrors.mirror import Mirror
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.prober import UnusableError
from provision.mirrors.record import OFFICIAL, MirrorSource
from provision.mirrors.tools import probe_pages
from provision.mirrors.tools.tool import MachineSettings, Tool

if TYPE_CHECKING:
    from provision.mirrors.probe_needs import ProbeNeeds
    from provision.mirrors.prober import Prober
    from provision.mirrors.record import MirrorRecord


class TorchMirror(Mirror):
    """Describe a mirror of PyTorch's wheels.

    `{variant}` in its url stands for the build, such as cpu or cu126.
    `kind`: an index with a page for torch, or one page that links every file.
    """

    kind: Literal["index", "find-links"] = "index"

    def source_for(self, name: str, needs: ProbeNeeds) -> MirrorSource:
        """Return the mirror as a source of one build of torch."""
        return MirrorSource(name, self.url.replace("{variant}", needs.variant.name), self.kind)


class Torch(Tool):
    """Answer for PyTorch's wheels. pip and uv install them; pip's file names their page (`Pip.config_files`)."""

    name = "torch"
    mirror_model: ClassVar[type[Mirror]] = TorchMirror

    def own_setting(self, machine: MachineSettings, record: MirrorRecord) -> str | None:  # noqa: ARG002 (none is ours)
        """Return pip's no-index, with which pip takes no page of torch either."""
        return "pip's no-index" if pip_settings.forbids_index(machine.pip) else None

    def official(self, needs: ProbeNeeds) -> MirrorSource:
        """Return the page that the variant names."""
        return MirrorSource(OFFICIAL, needs.variant.find_links or "", "find-links")

    def probe_files(self, needs: ProbeNeeds) -> list[ProbeFile]:
        """Return the builds with a local version, such as 2.13.0+cpu: no other index has them."""
        packages = needs.hashes.items()
        return [ProbeFile(name, version, "build", right) for name, (version, right) in packages if "+" in version]

    def probe(self, prober: Prober) -> None:
        """Probe the kind that the catalogue names, then the other one; the findings keep the kind that is right."""
        base = prober.target.url.rstrip("/")
        kinds = [("index", f"{base}/torch/"), ("find-links", f"{base}/")]
        kinds = kinds if prober.target.kind == "index" else kinds[::-1]
        for kind, url in kinds:
            is_last = kind == kinds[-1][0]
            try:
                files = {
                    probe_file: probe_pages.linked_files(prober, url, probe_file) for probe_file in prober.probe_files
                }
            except UnusableError:
                if is_last:
                    raise
                continue
            if any(files.values()) or is_last:
                prober.keep(kind=kind)
                probe_pages.check(prober, files)
                return

    @staticmethod
    def page(source: MirrorSource) -> str:
        """Return the page of a source that links the files of torch."""
        return source.url if source.kind == "find-links" else f"{source.url.rstrip('/')}/torch/"
