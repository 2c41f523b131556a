"""The interface of a tool for which mirrors are chosen, and the records that its methods take and return."""

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
    """Hold the sources of this machine's settings: the environment variables and the user's home folder."""

    environ: Mapping[str, str]
    home: Path

    @cached_property
    def pip(self) -> dict[str, list[str]]:
        """Return {option: values} of this machine's pip. The first access runs pip; the result is cached."""
        return pip_settings.pip_settings(self.environ)


class Stage(IntEnum):
    """Order the settings files: those of the environment first, then the user's. The record keeps this order."""

    ENVIRONMENT = 0
    PYTHON_START = 1
    CONDA_ENVIRONMENT = 2
    ACTIVATION = 3
    USER = 4
    USER_UV = 5


@dataclass(frozen=True)
class ConfigFile:
    """Describe one settings file. `render` returns the new content from the earlier one; b"" means no file."""

    path: Path
    render: Callable[[bytes], bytes]
    stage: Stage


@dataclass(frozen=True)
class ConfigScope:
    """Hold the inputs of the settings files: the chosen mirrors, one environment and one user.

    `python_source` is the origin of the Python at `prefix`; None where firstlight has made no environment there.
    `conda_is_here` is true where conda is installed.
    """

    record: MirrorRecord
    prefix: Path
    python_source: PythonSource | None
    home: Path
    environ: Mapping[str, str]
    conda_is_here: bool


class Tool(ABC):
    """Define one tool whose downloads can come from a mirror.

    `name` is the tool's key in the catalogue, in host.toml, in the record on the volume and in JSON.
    `mirror_model` is the model of its mirrors in the catalogue.
    `variable_groups` are the variables that firstlight sets for the tool.
    """

    name: ClassVar[str]
    mirror_model: ClassVar[type[Mirror]] = Mirror
    variable_groups: ClassVar[tuple[VariableGroup, ...]] = ()

    @abstractmethod
    def own_setting(self, machine: MachineSettings, record: MirrorRecord) -> str | None:
        """Return the user's own setting of a source as text, or None. A setting that `record` wrote does not count.

        Raises:
            SpecError: a settings file cannot be read.
        """

    @abstractmethod
    def official(self, needs: ProbeNeeds) -> MirrorSource:
        """Return the official source; its address is "" where the tool has none."""

    @abstractmethod
    def probe_files(self, needs: ProbeNeeds) -> list[ProbeFile]:
        """Return the few locked files that a probe looks for.

        Raises:
            SpecError: the file with the selected probe files is not valid.
        """

    @abstractmethod
    def probe(self, prober: Prober) -> None:
        """Probe one mirror for the probe files, and store the results in the findings of `prober`.

        Raises:
            UnusableError: the mirror cannot be used.
        """

    def target(self, source: MirrorSource, needs: ProbeNeeds) -> ProbeTarget | None:  # noqa: ARG002 (conda's needs it)
        """Return the probe target for a source, or None where the source cannot serve the locked files."""
        return ProbeTarget(self.name, source.name, source.url, source.kind)

    def variables(self, source: MirrorSource) -> dict[str, str]:  # noqa: ARG002 (a tool may read none)
        """Return {variable: value} for a mirror, with the variables of `variable_groups` in their order."""
        return {}

    def config_files(self, scope: ConfigScope) -> list[ConfigFile]:  # noqa: ARG002 (a tool may read none)
        """Return the settings files that name the chosen mirror of this tool."""
        return []
