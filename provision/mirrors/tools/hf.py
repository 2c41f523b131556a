"""Defines the tool hf: huggingface_hub, the library that downloads models from a hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.core.redact import redact
from provision.mirrors import official
from provision.mirrors.chosen_mirrors import OFFICIAL, MirrorSource
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.tools import probe_paths
from provision.mirrors.tools.tool import MachineSettings, Tool
from provision.volume.variables import VariableGroup

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.mirrors.chosen_mirrors import MirrorRecord
    from provision.mirrors.probe_mirror import Prober
    from provision.mirrors.probe_needs import ProbeNeeds


class Hf(Tool):
    """Defines the tool hf.

    huggingface_hub has no settings file. So its variables are set when the environment's Python starts.
    """

    name = "hf"
    variable_groups = (
        VariableGroup(
            "HF_ENDPOINT",
            ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
            at_start=True,
            at_activation=True,
        ),
    )

    def own_setting(self, machine: MachineSettings, record: MirrorRecord) -> str | None:
        """Return "HF_ENDPOINT=URL", without a password, if the user has set the variable; else None."""
        endpoint = self.own_endpoint(machine.environ, record)
        return f"HF_ENDPOINT={redact(endpoint)}" if endpoint else None

    def own_endpoint(self, environ: Mapping[str, str], record: MirrorRecord) -> str | None:
        """Return the value of HF_ENDPOINT in `environ` if the user has set it, else None.

        A value that is the URL of the chosen mirror does not count, because firstlight has set it.
        """
        endpoint = environ.get("HF_ENDPOINT")
        if endpoint and endpoint.rstrip("/") != record.chosen(self.name).url.rstrip("/"):
            return endpoint
        return None

    def official(self, needs: ProbeNeeds) -> MirrorSource:  # noqa: ARG002 (one hub serves every model)
        """Return the official hub, with its URL from the installed huggingface_hub."""
        return MirrorSource(OFFICIAL, official.official_endpoint())

    def probe_files(self, needs: ProbeNeeds) -> list[ProbeFile]:
        """Return the largest and the smallest pinned file of the host's models; empty if no file is pinned."""
        pinned = [
            ProbeFile(
                file.path,
                "",
                "pinned",
                frozenset({file.sha256 or file.git_sha1 or ""}),
                file.size,
                f"{model.repo}/resolve/{model.revision}/{file.path}",
                "sha256" if file.sha256 else "git_sha1",
            )
            for model in needs.models
            for file in model.files
            if file.locked and file.size is not None
        ]
        ordered = sorted(pinned, key=lambda probe_file: probe_file.size or 0)
        return list(dict.fromkeys([*ordered[-1:], *ordered[:1]]))

    def probe(self, prober: Prober) -> None:
        """Request the pinned files of the models at their pinned revisions."""
        base = prober.target.url.rstrip("/")
        probe_paths.check(prober, {probe_file: f"{base}/{probe_file.path}" for probe_file in prober.probe_files})

    def variables(self, source: MirrorSource) -> dict[str, str]:
        """Return the variable with the hub's URL, and two variables that switch off Xet and the implicit token."""
        # With Xet, huggingface_hub downloads from other hosts instead of the mirror. With the implicit token, it sends
        # the user's token to the mirror.
        return {"HF_ENDPOINT": source.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
