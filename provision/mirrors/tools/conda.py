"""Defines the tool conda: its mirrors and channels, its probe and its settings file .condarc."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field

from provision.installers import conda_settings
from provision.mirrors import config_text
from provision.mirrors.chosen_mirrors import OFFICIAL, MirrorSource
from provision.mirrors.mirror import Address, Mirror
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.probe_mirror import ProbeTarget, UnusableError
from provision.mirrors.tools import probe_paths
from provision.mirrors.tools.tool import ConfigFile, ConfigScope, MachineSettings, Stage, Tool
from provision.volume.variables import VariableGroup

if TYPE_CHECKING:
    from provision.mirrors.chosen_mirrors import MirrorRecord
    from provision.mirrors.probe_mirror import Prober
    from provision.mirrors.probe_needs import ProbeNeeds

_REPODATA_BYTES = 1024
_MAGIC = (b"{", b"\x28\xb5\x2f\xfd")  # the first bytes of repodata: JSON, or a zstd frame


class CondaMirror(Mirror):
    """Describe a mirror of conda channels; the URL of a channel is `url`/CHANNEL.

    `elsewhere`: {channel: the URL before /CHANNEL, if it is not `url`}.
    `lacks`: the channels that the mirror does not have.
    `defaults`: the URL below which the channels main, r and msys2 are; None if the mirror does not have them.
    """

    defaults: Address | None = None
    elsewhere: dict[str, Address] = Field(default_factory=dict)
    lacks: list[str] = Field(default_factory=list)

    def source_for(self, name: str, needs: ProbeNeeds) -> MirrorSource:
        """Return the mirror as a source of the locked channels and of conda-forge.

        A channel that the mirror does not have has its official URL in the result.
        """
        channels = dict.fromkeys([*locked_channels(needs), "conda-forge", *self.elsewhere])
        addresses = {channel: address for channel in channels if (address := self.channel(channel))}
        addresses |= {channel: f"{conda_settings.CHANNELS}/{channel}" for channel in self.lacks}
        return MirrorSource(name, self.url.rstrip("/"), channels=addresses, defaults=self.defaults)

    def channel(self, name: str) -> str | None:
        """Return the URL of a channel, without a trailing slash; None if the mirror does not have the channel."""
        if name in self.lacks:
            return None
        return f"{self.elsewhere.get(name, self.url).rstrip('/')}/{name}"


class Conda(Tool):
    """Defines the tool conda, whose mirrors have channels."""

    name = "conda"
    mirror_model: ClassVar[type[Mirror]] = CondaMirror
    variable_groups = (VariableGroup("CONDA_CHANNEL_ALIAS"),)

    def own_setting(self, machine: MachineSettings, record: MirrorRecord) -> str | None:
        """Return, as text, the first channel URL that the user has set in a variable or .condarc; None without one."""
        return conda_settings.own_channels(machine.environ, machine.home, record.chosen(self.name).conda_addresses)

    def official(self, needs: ProbeNeeds) -> MirrorSource:
        """Return conda's default host as a source of the locked channels."""
        channels = {name: f"{conda_settings.CHANNELS}/{name}" for name in locked_channels(needs)}
        return MirrorSource(OFFICIAL, conda_settings.CHANNELS, channels=channels)

    def probe_files(self, needs: ProbeNeeds) -> list[ProbeFile]:
        """Return the probe files of the platform in witnesses.toml, or the first three locked packages without any."""
        locked = {package.sha256: package for package in needs.conda}
        selected = needs.rows.conda.get(needs.platform or "", [])
        rows = [row for row in selected if row.sha256 in locked]
        if rows:
            return [
                ProbeFile(row.name, row.version, row.why, frozenset({row.sha256}), row.size, locked[row.sha256].url)
                for row in rows
            ]
        return [
            ProbeFile(package.name, package.version, "locked", frozenset({package.sha256}), None, package.url)
            for package in needs.conda[:3]
        ]

    def target(self, source: MirrorSource, needs: ProbeNeeds) -> ProbeTarget | None:
        """Return the target of a probe of the locked channels; None if the source does not have one of them."""
        locked = locked_channels(needs)
        channels = {name: source.channels[name] for name in locked if name in source.channels}
        if set(channels) != set(locked):
            return None
        return ProbeTarget(self.name, source.name, source.url, source.kind, channels)

    def probe(self, prober: Prober) -> None:
        """Read the first bytes of each channel's repodata, then request the probe files.

        Raises:
            UnusableError: a channel has no repodata, or a file has a wrong checksum.
        """
        for name, base in prober.target.channels.items():
            response = prober.get(f"{base}/noarch/repodata.json", limit=_REPODATA_BYTES, first=0)
            if response.status not in {200, 206}:
                raise UnusableError(f"answers {response.status} for the channel {name}")
            if not response.content.startswith(_MAGIC):
                raise UnusableError(f"sends no repodata for the channel {name}")
        probe_paths.check(prober, {file: _channel_url(prober.target, file) for file in prober.probe_files})

    def variables(self, source: MirrorSource) -> dict[str, str]:
        """Return {"CONDA_CHANNEL_ALIAS": the URL before the names of the channels}."""
        return {"CONDA_CHANNEL_ALIAS": source.url}

    def config_files(self, scope: ConfigScope) -> list[ConfigFile]:
        """Return the .condarc of the environment, if it has conda's Python, and the user's .condarc.

        The user's file is left out if conda is not installed and the file does not exist.
        """
        source = scope.record.chosen(self.name)
        is_windows = sys.platform == "win32"
        values = (
            {} if source.is_official else settings(source, nodefaults=scope.record.nodefaults, is_windows=is_windows)
        )

        def render(content: bytes) -> bytes:
            return config_text.condarc(content, values)

        files = []
        if scope.python_source is not None and scope.python_source.is_conda:
            files.append(ConfigFile(scope.prefix / ".condarc", render, Stage.CONDA_ENVIRONMENT))
        user = Path(scope.environ["CONDARC"]) if scope.environ.get("CONDARC") else scope.home / ".condarc"
        if scope.conda_is_here or user.exists():
            files.append(ConfigFile(user, render, Stage.USER))
        return files


def locked_channels(needs: ProbeNeeds) -> list[str]:
    """Return the sorted names of the channels of the locked packages."""
    paths = [package.url.removeprefix(f"{conda_settings.CHANNELS}/") for package in needs.conda]
    return sorted({path.partition("/")[0] for path in paths})


def settings(source: MirrorSource, *, nodefaults: bool, is_windows: bool = False) -> dict[str, Any]:
    """Return {key of .condarc: value} for a mirror.

    Args:
        source: the mirror.
        nodefaults: leave conda's default channels out.
        is_windows: add msys2 to conda's default channels.
    """
    values: dict[str, Any] = {"channel_alias": source.url}
    values["custom_channels"] = {name: url.removesuffix(f"/{name}") for name, url in source.channels.items()}
    if nodefaults:
        return values | {"channels": ["conda-forge", "nodefaults"]}
    if source.defaults:
        names = ("main", "r", *(["msys2"] if is_windows else []))
        values["default_channels"] = [f"{source.defaults}/{name}" for name in names]
    return values


def _channel_url(target: ProbeTarget, probe_file: ProbeFile) -> str | None:
    channel, _, rest = urlsplit(probe_file.path or "").path.lstrip("/").partition("/")
    return f"{target.channels[channel]}/{rest}" if channel in target.channels else None
