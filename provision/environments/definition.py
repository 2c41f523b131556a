"""What an environment is made of, by its folder under envs/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.python_source import PythonSource

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.config.torch import Variant


@dataclass(frozen=True)
class EnvironmentDefinition:
    """What an environment is made of.

    `folder` holds its locks; `variants` is the wanted one first, then its stand-ins; `pythons` are the versions that
    the locks hold wheels for; `interpreter` is auto, conda or system; `platform` is conda's name of this machine;
    `reason` says why the variant, `warning` what its owner should know of it.
    """

    name: str
    folder: Path
    variants: Sequence[Variant]
    pythons: Sequence[str]
    interpreter: str
    platform: str | None
    reason: str
    warning: str | None = None

    @property
    def python_source(self) -> PythonSource:
        """Return the source of python that is asked for."""
        return PythonSource(self.interpreter)

    @property
    def conda_lock(self) -> Path | None:
        """The lock of the conda part, where there is one."""
        lock = self.folder / "conda-lock.yml"
        return lock if lock.exists() else None
