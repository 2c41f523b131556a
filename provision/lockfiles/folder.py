"""Reads the lock files of one environment, each at most once in a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from provision.core.errors import FirstlightError
from provision.lockfiles import conda_lock, requirements

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from provision.lockfiles.conda_lock import CondaPackage
    from provision.lockfiles.requirements import LockedPackage


@dataclass(frozen=True)
class LockFolder:
    """The folder of one environment under envs/. Each file in it is read when it is first needed, and then kept."""

    path: Path
    _texts: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _packages: dict[tuple[str, str], Sequence[LockedPackage]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def pip_file(self, variant: str) -> Path:
        """Return the path of pip's lock of a variant; the file may be absent."""
        return self.path / f"{variant}.lock"

    @property
    def conda_file(self) -> Path:
        """Return the path of conda's lock; the file may be absent."""
        return self.path / "conda-lock.yml"

    def text(self, variant: str) -> str:
        """Return the text of pip's lock of a variant.

        Raises:
            OSError: it cannot be read.
            UnicodeDecodeError: it is not UTF-8.
        """
        if variant not in self._texts:
            self._texts[variant] = self.pip_file(variant).read_text(encoding="utf-8")
        return self._texts[variant]

    def packages(self, variant: str, python: str) -> Sequence[LockedPackage]:
        """Return the packages that pip's lock of a variant pins for this system and a version of Python.

        Raises:
            FirstlightError: the lock cannot be read, or a line is no pinned requirement.
        """
        if (variant, python) not in self._packages:
            lock = self.pip_file(variant)
            try:
                text = self.text(variant)
            except OSError as error:
                raise FirstlightError(
                    f"{lock} cannot be read: {error.strerror}. Restore it: git checkout -- {lock}"
                ) from error
            self._packages[variant, python] = tuple(requirements.parse(text, python, lock))
        return self._packages[variant, python]

    def hashes(self, variant: str) -> Mapping[str, tuple[str, frozenset[str]]]:
        """Return {package: (version, its sha256 hashes)} of pip's lock of a variant.

        Raises:
            OSError: it cannot be read.
            UnicodeDecodeError: it is not UTF-8.
        """
        return requirements.hashes(self.text(variant))

    def conda_packages(self, platform: str | None = None) -> Sequence[CondaPackage]:
        """Return the packages that conda's lock pins for a platform; None: for all platforms.

        Raises:
            SpecError: the lock cannot be read, is no lock of version 1, or does not have the platform.
        """
        return conda_lock.of_platform(self.conda_file, self._conda_packages, platform)

    def environment(self) -> conda_lock.Environment | None:
        """Return the content of environment.yml; None where there is no such file.

        Raises:
            SpecError: it cannot be read, or it asks conda and pip for one package.
        """
        return self._environment

    @cached_property
    def _environment(self) -> conda_lock.Environment | None:
        file = self.path / "environment.yml"
        return conda_lock.read_environment(file) if file.exists() else None

    @cached_property
    def _conda_packages(self) -> Sequence[CondaPackage]:
        return tuple(conda_lock.read_lock(self.conda_file))
