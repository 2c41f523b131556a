"""Installs the conda packages of an environment with rattler: Python, and the other packages in the conda lock file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError, SpecError
from provision.core.python_source import PythonSource
from provision.environments import package_caches
from provision.environments.prefix import conda_records
from provision.installers import rattler
from provision.lockfiles import conda_lock
from provision.volume.environment_marker import python_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.environments.package_sources import PackageSources
    from provision.lockfiles.conda_lock import CondaPackage
    from provision.lockfiles.folder import LockFolder


@dataclass
class CondaInstaller:
    """Installs the conda packages of one environment.

    `locks`: the lock folder of the environment. `lock`: the path of its conda lock file; None if there is none.
    `platform`: conda's name of this host's platform, such as "linux-64"; None if conda has no name for it.
    `requested`: the requested source of Python: AUTO, CONDA or SYSTEM.
    `final_prefix`: the prefix of the finished environment, which may be built in another folder.
    `root`: the root, with the package cache. `sources`: the sources of the packages.
    `offline`: install only packages that are in the package cache.
    """

    locks: LockFolder
    lock: Path | None
    platform: str | None
    requested: PythonSource
    final_prefix: Path
    root: Root
    sources: PackageSources
    offline: bool

    def choose(self) -> tuple[PythonSource, str | None]:
        """Return (the source of Python, CONDA or SYSTEM; the reason if SYSTEM is a fallback, else None).

        Raises:
            SpecError: CONDA is requested, and there is no conda lock file.
            BlockedError: CONDA is requested, and the conda packages cannot be installed.
        """
        if self.requested.is_system or (self.requested.is_auto and self.lock is None):
            return PythonSource.SYSTEM, None
        if self.lock is None:
            raise SpecError(
                f"{self.locks.path} has no conda-lock.yml, so conda cannot provide Python. Request the system's Python "
                f'(interpreter = "system" in host.toml), or write an environment.yml and run '
                f"`{layout.program()} env lock {self.locks.path.name}`."
            )
        reason = self._obstacle()
        if reason is None:
            return PythonSource.CONDA, None
        if self.requested.is_conda:
            raise BlockedError(
                f"conda cannot provide Python: {reason}. Set a mirror (channel_alias in ~/.condarc, or "
                'CONDA_CHANNEL_ALIAS), or request the system\'s Python: interpreter = "system" in host.toml.'
            )
        return PythonSource.SYSTEM, reason

    def _obstacle(self) -> str | None:
        """Return, as text, why the conda packages cannot be installed now; None if they can."""
        if self.platform is None:
            return "conda has no name for this platform"
        # A lock file that cannot be read raises an error. A lock file that is only for other platforms is a reason to
        # use the system's Python.
        locked = self.locks.conda_packages()
        try:
            packages = conda_lock.of_platform(self.locks.conda_file, locked, self.platform)
        except SpecError as error:
            return str(error).rstrip(".")
        missing = rattler.not_cached(packages, self._cache)
        if missing and self.offline:
            return f"offline, and {len(missing)} of {len(packages)} conda packages are not in {self._cache}"
        return self.sources.unreachable(missing)

    def install(self, folder: Path, reinstall: Sequence[str] = ()) -> None:
        """Install the packages of the conda lock file into a folder.

        Args:
            folder: the folder in which the environment is made.
            reinstall: the names of packages whose files are written again.

        Raises:
            SpecError: there is no conda lock file for this platform.
            BlockedError: a package is not cached and the run is offline, or no space is left.
            FirstlightError: a package cannot be downloaded, or its checksum is wrong.
        """
        lock, platform = self.lock, self.platform
        if lock is None or platform is None:
            raise SpecError(
                f"{self.locks.path} has no conda-lock.yml for this platform. Restore the file: "
                f"git checkout -- {self.locks.conda_file}"
            )
        mirrors = self.sources.for_conda(self.packages())
        if self.offline and (missing := rattler.not_cached(self.packages(), self._cache)):
            raise BlockedError(f"offline, and {missing[0].name} is not in {self._cache}. Run again without --offline.")
        environment = self.locks.environment()
        specs = [spec for spec, _ in environment.conda] if environment is not None else []
        rattler.install(
            lock,
            platform,
            folder,
            self._cache,
            mirrors,
            final=self.final_prefix,
            specs=specs,
            reinstall=reinstall,
            kept=set(conda_records(folder)) - {package.name for package in self.packages()},
            full=bool(reinstall),
        )

    def packages(self, marker: dict[str, object] | None = None) -> Sequence[CondaPackage]:
        """Return the packages in the conda lock file for this platform; empty without a lock file.

        Args:
            marker: the content of an environment's marker file; None before it is built. The result is empty if the
                environment has the system's Python.
        """
        if self.lock is None or (marker is not None and not python_source(marker).is_conda):
            return []
        return self.locks.conda_packages(self.platform)

    def python_version(self, source: PythonSource = PythonSource.AUTO) -> str | None:
        """Return the version of Python in the conda lock file; None if the environment uses the system's Python.

        `source` is the source of Python that `choose` has returned; AUTO before `choose` is called.
        """
        if source.is_system or self.requested.is_system or self.lock is None or self.platform is None:
            return None
        return next((package.version for package in self.packages() if package.name == "python"), None)

    @property
    def _cache(self) -> Path:
        return package_caches.of(self.root).conda

    def copy_warning(self) -> str | None:
        """Return a warning if the package cache is on another file system than the prefix; else None.

        Then files are copied from the cache instead of hard-linked, and need their disk space twice.
        """
        if self._cache != self.root.pkgs or not self._cache.exists():
            return None
        if self._cache.stat().st_dev == self.final_prefix.stat().st_dev:
            return None
        return (
            f"{self._cache} is on another file system than {self.final_prefix}, so its files were copied instead of "
            "hard-linked"
        )
