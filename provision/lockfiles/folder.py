"""Reads the lock files of one environment, each file at most once in a run."""

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
    """Represents the lock folder of one environment, a folder in envs/.

    Each file of the folder is read when it is first needed. Its content is kept for the rest of the run.
    """

    path: Path
    _texts: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _packages: dict[tuple[str, str], Sequence[LockedPackage]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def pip_file(self, variant: str) -> Path:
        """Return the path of the pip lock file of a variant, such as "cu128"; the file may be missing."""
        return self.path / f"{variant}.lock"

    @property
    def conda_file(self) -> Path:
        """Return the path of the conda lock file; the file may be missing."""
        return self.path / "conda-lock.yml"

    def text(self, variant: str) -> str:
        """Return the text of the pip lock file of a variant.

        Raises:
            FirstlightError: the file cannot be read, or is not UTF-8.
        """
        if variant not in self._texts:
            lock = self.pip_file(variant)
            try:
                self._texts[variant] = lock.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                raise FirstlightError(f"{lock} cannot be read: {reason}. Restore it: git checkout -- {lock}") from error
        return self._texts[variant]

    def packages(self, variant: str, python: str) -> Sequence[LockedPackage]:
        """Return the packages that the pip lock file of a variant pins for this system.

        Args:
            variant: the build of torch, such as "cu128".
            python: the version of Python, such as "3.12.3", for the markers in the file.

        Raises:
            FirstlightError: the file cannot be read, or a line is not a pinned requirement.
        """
        if (variant, python) not in self._packages:
            packages = requirements.parse(self.text(variant), python, self.pip_file(variant))
            self._packages[variant, python] = tuple(packages)
        return self._packages[variant, python]

    def hashes(self, variant: str) -> Mapping[str, tuple[str, frozenset[str]]]:
        """Return {name of a package: (version, its sha256 hashes)} from the pip lock file of a variant.

        Raises:
            FirstlightError: the file cannot be read, or is not UTF-8.
        """
        return requirements.hashes(self.text(variant))

    def conda_packages(self, platform: str | None = None) -> Sequence[CondaPackage]:
        """Return the packages in the conda lock file.

        Args:
            platform: conda's name of the platform whose packages are returned; None: of all platforms.

        Raises:
            SpecError: the file cannot be read, is not a lock file of version 1, or has no package of the platform.
        """
        return conda_lock.of_platform(self.conda_file, self._conda_packages, platform)

    def environment(self) -> conda_lock.Environment | None:
        """Return the content of environment.yml; None if there is no such file.

        Raises:
            SpecError: the file cannot be read, has an invalid entry, or requires the same package from conda and pip.
        """
        return self._environment

    @cached_property
    def _environment(self) -> conda_lock.Environment | None:
        file = self.path / "environment.yml"
        return conda_lock.read_environment(file) if file.exists() else None

    @cached_property
    def _conda_packages(self) -> Sequence[CondaPackage]:
        return tuple(conda_lock.read_lock(self.conda_file))
