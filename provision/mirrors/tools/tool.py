"""Defines the interface of a tool for which mirrors are chosen, and the records that its methods use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from provision.installers import pip_settings
from provision.mirrors.mirror import Mirror
from provision.mirrors.probe_mirror import ProbeTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from provision.core.python_source import PythonSource
    from provision.mirrors.chosen_mirrors import MirrorRecord, MirrorSource
    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.probe_mirror import Prober
    from provision.mirrors.probe_needs import ProbeNeeds
    from provision.volume.variables import VariableGroup


@dataclass(frozen=True)
class MachineSettings:
    """Hold the places of the host's own settings: the environment variables and the user's home folder."""

    environ: Mapping[str, str]
    home: Path

    @cached_property
    def pip(self) -> dict[str, list[str]]:
        """Return {option of pip: its values} on this host; pip is run once, and the result is cached."""
        return pip_settings.pip_settings(self.environ)


class Stage(IntEnum):
    """Name the kinds of settings files in the order in which they are written and recorded.

    ENVIRONMENT: pip's file in the environment. PYTHON_START: the .pth file that sets variables when Python starts.
    CONDA_ENVIRONMENT: the environment's .condarc. ACTIVATION: the activation scripts. USER: the user's files of pip and
    conda. USER_UV: the user's file of uv.
    """

    ENVIRONMENT = 0
    PYTHON_START = 1
    CONDA_ENVIRONMENT = 2
    ACTIVATION = 3
    USER = 4
    USER_UV = 5


@dataclass(frozen=True)
class ConfigFile:
    """Describe one settings file.

    `path`: its path. `stage`: its kind.
    `render`: returns the new content for the earlier content; b"" stands for a file that does not exist.
    """

    path: Path
    render: Callable[[bytes], bytes]
    stage: Stage


@dataclass(frozen=True)
class ConfigScope:
    """Hold the inputs for the content of the settings files: the chosen mirrors, one environment and one user.

    `record`: the record of the chosen mirrors. `prefix`: the folder of the environment.
    `python_source`: the source of the environment's Python, CONDA or SYSTEM; None if firstlight has built no
        environment at `prefix`.
    `home`: the user's home folder. `environ`: the environment variables.
    `conda_is_here`: conda is installed on this host.
    """

    record: MirrorRecord
    prefix: Path
    python_source: PythonSource | None
    home: Path
    environ: Mapping[str, str]
    conda_is_here: bool


class Tool(ABC):
    """Defines one tool that can download from a mirror.

    `name`: the name of the tool in the catalogue, in host.toml, in the record in the root, and in JSON.
    `mirror_model`: the pydantic model of its mirrors in the catalogue.
    `variable_groups`: the environment variables that firstlight sets for the tool.
    """

    name: ClassVar[str]
    mirror_model: ClassVar[type[Mirror]] = Mirror
    variable_groups: ClassVar[tuple[VariableGroup, ...]] = ()

    @abstractmethod
    def own_setting(self, machine: MachineSettings, record: MirrorRecord) -> str | None:
        """Return, as text, the first setting of a source that the user has made; None without one.

        Args:
            machine: the host's own settings.
            record: the record of the chosen mirrors; a setting with the URL of a chosen mirror does not count.

        Raises:
            SpecError: a settings file cannot be read.
        """

    @abstractmethod
    def official(self, needs: ProbeNeeds) -> MirrorSource:
        """Return the official source; its URL is "" if there is no official page for the variant of torch."""

    @abstractmethod
    def probe_files(self, needs: ProbeNeeds) -> list[ProbeFile]:
        """Return the few locked files that a probe requests; empty if the host needs no file of this tool.

        Raises:
            SpecError: witnesses.toml is not valid.
        """

    @abstractmethod
    def probe(self, prober: Prober) -> None:
        """Request the probe files from one mirror, and store the results in the findings of `prober`.

        Raises:
            UnusableError: the mirror cannot be used.
        """

    def target(self, source: MirrorSource, needs: ProbeNeeds) -> ProbeTarget | None:  # noqa: ARG002 (conda's needs it)
        """Return the target of a probe for a source; None if the source cannot have the locked files."""
        return ProbeTarget(self.name, source.name, source.url, source.kind)

    def variables(self, source: MirrorSource) -> dict[str, str]:  # noqa: ARG002 (a tool may read none)
        """Return {environment variable: value} with which the tool uses a mirror; {} if it reads no variable."""
        return {}

    def config_files(self, scope: ConfigScope) -> list[ConfigFile]:  # noqa: ARG002 (a tool may read none)
        """Return the settings files that must have the URL of the chosen mirror; [] if the tool has none."""
        return []
