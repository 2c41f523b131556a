"""Defines the tool torch: PyTorch's builds, such as 2.13.0+cpu, which are on an index or page of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from provision.installers import pip_settings
from provision.mirrors.chosen_mirrors import OFFICIAL, MirrorSource
from provision.mirrors.mirror import Mirror
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.probe_mirror import UnusableError
from provision.mirrors.tools import probe_pages
from provision.mirrors.tools.tool import MachineSettings, Tool

if TYPE_CHECKING:
    from provision.mirrors.chosen_mirrors import MirrorRecord
    from provision.mirrors.probe_mirror import Prober
    from provision.mirrors.probe_needs import ProbeNeeds


class TorchMirror(Mirror):
    """Describe a mirror of PyTorch's builds.

    In `url`, the text {variant} is replaced by the variant, such as cpu or cu126.
    `kind`: the layout: "index" (an index with a page for torch) or "find-links" (one page with links to all files).
    """

    kind: Literal["index", "find-links"] = "index"

    def source_for(self, name: str, needs: ProbeNeeds) -> MirrorSource:
        """Return the mirror as a source of the variant in `needs`."""
        return MirrorSource(name, self.url.replace("{variant}", needs.variant.name), self.kind)


class Torch(Tool):
    """Defines the tool torch.

    pip and uv install its builds, so the page of the chosen mirror is written into the environment's pip.conf.
    """

    name = "torch"
    mirror_model: ClassVar[type[Mirror]] = TorchMirror

    def own_setting(self, machine: MachineSettings, record: MirrorRecord) -> str | None:  # noqa: ARG002 (no such setting is written)
        """Return "pip's no-index" if this setting is on, since it forbids the pages of torch as well; else None."""
        return "pip's no-index" if pip_settings.forbids_index(machine.pip) else None

    def official(self, needs: ProbeNeeds) -> MirrorSource:
        """Return the official page with links to the variant's builds."""
        return MirrorSource(OFFICIAL, needs.variant.find_links or "", "find-links")

    def probe_files(self, needs: ProbeNeeds) -> list[ProbeFile]:
        """Return the packages in the lock file with a version such as 2.13.0+cpu, which no other index has."""
        packages = needs.hashes.items()
        return [ProbeFile(name, version, "build", hashes) for name, (version, hashes) in packages if "+" in version]

    def probe(self, prober: Prober) -> None:
        """Probe the layout in the catalogue, then the other layout; store the layout that has the files.

        Raises:
            UnusableError: the responses are not index pages, or a file has a wrong checksum.
        """
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
                prober.update(kind=kind)
                probe_pages.check(prober, files)
                return

    @staticmethod
    def page(source: MirrorSource) -> str:
        """Return the URL of the page on which a source has links to the files of torch."""
        return source.url if source.kind == "find-links" else f"{source.url.rstrip('/')}/torch/"
