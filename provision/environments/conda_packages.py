"""The conda part of an environment, installed by rattler: its interpreter, and what else its lock holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, SpecError
from provision.core.python_source import PythonSource
from provision.environments import prefix
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
    """Install the conda part of one environment: `lock` for `platform` (conda's name of this machine), or nothing.

    `locks` holds the lock files, and `place` is where the environment lies in the end. `wanted` is the source of python
    that is asked for.
    """

    locks: LockFolder
    lock: Path | None
    platform: str | None
    wanted: PythonSource
    place: Path
    root: Root
    supply: PackageSources
    offline: bool

    def choose(self) -> tuple[PythonSource, str | None]:
        """Conda or system; and why the system's stands in where conda's was meant."""
        wanted, lock = self.wanted, self.lock
        if wanted.is_system or (wanted.is_auto and lock is None):
            return PythonSource.SYSTEM, None
        if lock is None:
            raise SpecError(f"{self.locks.path} has no conda-lock.yml, so its python cannot come from conda.")
        reason = self._no_conda()
        if reason is None:
            return PythonSource.CONDA, None
        if wanted.is_conda:
            raise BlockedError(
                f"python cannot be had from conda: {reason}. Name a mirror (channel_alias in ~/.condarc, or "
                'CONDA_CHANNEL_ALIAS), or take the system\'s python: interpreter = "system" in host.toml.'
            )
        return PythonSource.SYSTEM, reason

    def _no_conda(self) -> str | None:
        """Return why the conda part cannot be installed here and now, or None."""
        if self.platform is None:
            return "conda has no name for this platform"
        every = self.locks.conda_packages()  # a lock that cannot be read is an error; one for other platforms is none
        try:
            packages = conda_lock.of_platform(self.locks.conda_file, every, self.platform)
        except SpecError as error:
            return str(error).rstrip(".")
        absent = rattler.not_cached(packages, self.root.pkgs)
        if absent and self.offline:
            return f"offline, and {len(absent)} of {len(packages)} conda packages are not in {self.root.pkgs}"
        return self.supply.unreachable(absent)

    def install(self, where: Path, reinstall: Sequence[str] = ()) -> None:
        """Install the lock into a folder; the packages of `reinstall` are put anew.

        Raises:
            SpecError: there is no lock for this platform.
            BlockedError: offline, and a package is not cached; or no space is left.
        """
        lock, platform = self.lock, self.platform
        if lock is None or platform is None:
            raise SpecError(f"{self.locks.path} has no conda-lock.yml for this platform. Restore it.")
        mirrored = self.supply.for_conda(self.packages())
        if self.offline and (absent := rattler.not_cached(self.packages(), self.root.pkgs)):
            raise BlockedError(
                f"offline, and {absent[0].name} is not in {self.root.pkgs}. Run again without --offline."
            )
        environment = self.locks.environment()
        specs = [spec for spec, _ in environment.conda] if environment is not None else []
        rattler.install(
            lock,
            platform,
            where,
            self.root.pkgs,
            mirrored,
            final=self.place,
            specs=specs,
            reinstall=reinstall,
            kept=set(prefix.conda_records(where)) - {each.name for each in self.packages()},
            full=bool(reinstall),
        )

    def packages(self, owner: dict[str, object] | None = None) -> Sequence[CondaPackage]:
        """Return what the lock holds; nothing for an environment (`owner`) whose python is the system's."""
        if self.lock is None or (owner is not None and not python_source(owner).is_conda):
            return []
        return self.locks.conda_packages(self.platform)

    def python(self, source: PythonSource = PythonSource.AUTO) -> str | None:
        """Return the version of the lock's python, or None where the environment has the system's."""
        if source.is_system or self.wanted.is_system or self.lock is None or self.platform is None:
            return None
        return next((each.version for each in self.packages() if each.name == "python"), None)

    def far_cache(self) -> str | None:
        """Return why packages were copied instead of linked, or None."""
        if not self.root.pkgs.exists() or self.root.pkgs.stat().st_dev == self.place.stat().st_dev:
            return None
        return f"{self.root.pkgs} lies on another file system than {self.place}: its files were copied, not linked"
