"""The pip part of an environment, installed by uv: every package by hash, what is harmed put anew."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from provision.core import layout, process
from provision.core.errors import BlockedError
from provision.environments import installed_wheels
from provision.environments.torch_fallback import TorchError
from provision.installers import uv as uv_installer
from provision.lockfiles import requirements
from provision.volume import environment_marker

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.config.torch import Variant
    from provision.environments.package_sources import PackageSources
    from provision.environments.torch_fallback import InstallRoute
    from provision.lockfiles.requirements import LockedPackage


class _NotCachedError(BlockedError):
    """Offline, and something is not in the cache."""


@dataclass(frozen=True)
class PipInstaller:
    """Run uv for one environment; messages call it `place`."""

    place: Path
    uv: uv_installer.UvSources
    supply: PackageSources
    offline: bool

    def venv(self, where: Path, base: Path) -> None:
        """Make, or make anew, a virtual environment that may be moved as a whole.

        Raises:
            BlockedError: no space is left.
            CommandError: uv failed.
        """
        flags: list[str | Path] = [
            "--quiet",
            "--no-project",
            "--allow-existing",
            "--relocatable",
            "--prompt",
            self.place.name,
        ]
        self._run(["venv", *flags, "--python", base, where], self.uv)

    def install(
        self, where: Path, way: InstallRoute, version: str, wanted: Sequence[LockedPackage], asked: str
    ) -> None:
        """Make an environment hold what a lock asks for; what else is in it stays.

        Args:
            where: the environment as it lies now.
            way: the build of torch, and where it comes from.
            version: of its python, such as "3.11.7".
            wanted: the packages.
            asked: the lock's text.

        Raises:
            BlockedError: no space is left; or, offline, a package is not in the cache.
            TorchError: torch could not be installed, and everything else could.
            CommandError: uv failed.
        """
        site = environment_marker.site_packages(where, version)
        found = installed_wheels.harmed_packages(site, wanted, deep=True)
        harmed = {name for name, reason in found.items() if reason != installed_wheels.ABSENT}
        install: list[str | Path] = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", "-"]
        install += ["--python", layout.interpreter(where)]
        # uv trusts a .dist-info folder: a package whose files are harmed has to be named. Only then: what is named is
        # unpacked again.
        for name in sorted(harmed):
            install += ["--reinstall-package", name]
        self._install(install, way, asked)
        mended = [package for package in wanted if package.name in harmed]
        spread = installed_wheels.harmed_packages(site, mended, deep=True)
        if spread:
            # An installed file is a hard link into uv's cache: harm to the one is harm to the other.
            self._run(["cache", "clean", "--quiet", *spread], self.uv)
            self._install(install, way, asked)

    def _install(self, install: Sequence[str | Path], way: InstallRoute, asked: str) -> None:
        torch, rest = requirements.split(asked, {"torch"})
        if way.page is None:
            try:
                self._from_own(install, way.variant, asked)
            except (process.CommandError, _NotCachedError) as error:
                # uv's words do not tell whose fault it is. A second run does: without torch it works, or it does not.
                if not torch.strip():
                    raise
                self._from_own(install, way.variant, rest)
                raise TorchError(str(error)) from error
            return
        self._from_own(install, way.variant, rest)
        # From this page alone: whatever the machine's own sources list of torch has been passed over.
        links = {name: value for name, value in self.uv.environment.items() if name != "UV_FIND_LINKS"}
        alone = replace(self.uv, environment=links, config={})
        try:
            self._run([*install, "--no-index", "--find-links", way.page], alone, torch, way.variant)
        except (process.CommandError, _NotCachedError) as error:
            raise TorchError(str(error)) from error

    def _from_own(self, install: Sequence[str | Path], variant: Variant, asked: str) -> None:
        uv = self.supply.for_wheels(self.uv, variant, asked)
        words = [*install, *self.uv.flags]
        try:
            self._run(words, uv, asked, variant)
        except _NotCachedError:
            if uv is self.uv:
                raise
            self._run(words, self.uv, asked, variant)  # it may have been fetched before there was a mirror

    def _run(
        self,
        arguments: Sequence[str | Path],
        uv: uv_installer.UvSources,
        stdin: str | None = None,
        variant: Variant | None = None,
    ) -> None:
        """Run uv; `variant`: what it installs, so that the message of a full disk names the bytes needed."""
        needed = variant.install_bytes if variant else None
        try:
            uv_installer.run_uv(arguments, uv, stdin)
        except process.CommandError as error:
            ours = self.supply.failure()
            if re.search(r"os error 28|No space left|os error 122|Disk quota", f"{error} {ours}"):
                wanted = f" (about {needed:,} bytes are needed)" if needed else ""
                raise BlockedError(
                    f"{self.place}: no space left{wanted}. Free some, or give another --root, then run again."
                ) from error
            if self.offline:
                reason = str(error).splitlines()[-1].strip().rstrip(".")
                raise _NotCachedError(
                    f"{self.place} cannot be made whole without the network: {reason}. "
                    f"Run `{layout.next_command('setup')}`."
                ) from error
            if ours is not None:
                raise process.CommandError(f"{self.place}: {ours}") from error
            raise
