"""The shape that every tool has: what it is asked about its mirrors, and the records that the answers take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from provision.installers import pip_settings
from provision.mirrors.mirror import Mirror
from provision.mirrors.prober import ProbeTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from provision.core.python_source import PythonSource
    from provision.mirrors.probe_files import ProbeFile
    from provision.mirrors.probe_needs import ProbeNeeds
    from provision.mirrors.prober import Prober
    from provision.mirrors.record import MirrorRecord, MirrorSource
    from provision.volume.variables import VariableGroup


@dataclass(frozen=True)
class MachineSettings:
    """Hold where the settings of this machine lie: its variables, and the home of its user."""

    environ: Mapping[str, str]
    home: Path

    @cached_property
    def pip(self) -> dict[str, list[str]]:
        """Return {option: values} of this machine's pip, which is started for them once."""
        return pip_settings.pip_settings(self.environ)


class Stage(IntEnum):
    """Order the configuration files: those of the environment first, then the user's. The record keeps this order."""

    ENVIRONMENT = 0
    PYTHON_START = 1
    CONDA_ENVIRONMENT = 2
    ACTIVATION = 3
    USER = 4
    USER_UV = 5


@dataclass(frozen=True)
class ConfigFile:
    """Name a file, and how its content is made from the content before; an empty content stands for no file."""

    path: Path
    render: Callable[[bytes], bytes]
    stage: Stage


@dataclass(frozen=True)
class ConfigScope:
    """Hold what configuration files are written for: the chosen mirrors, one environment and one user.

    `python_source` is that of the environment at `prefix`; None where firstlight made none there.
    """

    record: MirrorRecord
    prefix: Path
    python_source: PythonSource | None
    home: Path
    environ: Mapping[str, str]
    conda_is_here: bool


class Tool(ABC):
    """Answer for one tool whose files mirrors serve.

    `name` is its key in the catalogue, in host.toml, in the record on the volume and in JSON.
    `mirror_model` is the form of its mirrors in the catalogue. `variable_groups` are the variables that it reads.
    """

    name: ClassVar[str]
    mirror_model: ClassVar[type[Mirror]] = Mirror
    variable_groups: ClassVar[tuple[VariableGroup, ...]] = ()

    @abstractmethod
    def own_setting(self, machine: MachineSettings, record: MirrorRecord) -> str | None:
        """Return the user's own setting of a source, in words, or None. What `record` wrote does not count.

        Raises:
            SpecError: a settings file cannot be read.
        """

    @abstractmethod
    def official(self, needs: ProbeNeeds) -> MirrorSource:
        """Return the official source with its address, "" where there is none."""

    @abstractmethod
    def probe_files(self, needs: ProbeNeeds) -> list[ProbeFile]:
        """Return the few locked files by which its mirrors are judged.

        Raises:
            SpecError: the file that names them is wrong.
        """

    @abstractmethod
    def probe(self, prober: Prober) -> None:
        """Look for the probe files on one mirror, and keep what it holds in the findings of `prober`.

        Raises:
            UnusableError: the mirror cannot be used.
        """

    def target(self, source: MirrorSource, needs: ProbeNeeds) -> ProbeTarget | None:  # noqa: ARG002 (conda's needs it)
        """Return how a source is probed, or None where it cannot serve what `needs` locks."""
        return ProbeTarget(self.name, source.name, source.url, source.kind)

    def variables(self, source: MirrorSource) -> dict[str, str]:  # noqa: ARG002 (a tool may read none)
        """Return the variables of `variable_groups` that name a mirror, in their order."""
        return {}

    def config_files(self, scope: ConfigScope) -> list[ConfigFile]:  # noqa: ARG002 (a tool may read none)
        """Return the files that name its chosen mirror."""
        return []
