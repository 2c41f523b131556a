"""Installs the pip packages of an environment with uv, each by its pinned hash, and reinstalls damaged packages."""

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
    """Report that uv runs offline and a package is not in uv's cache."""


@dataclass(frozen=True)
class PipInstaller:
    """Runs uv for one environment.

    `final_prefix`: the prefix of the finished environment, which may be built in another folder.
    `uv`: the inputs of uv, with the sources in the host's settings. `sources`: the sources of the packages.
    `offline`: install only cached packages.
    """

    final_prefix: Path
    uv: uv_installer.UvSources
    sources: PackageSources
    offline: bool

    def venv(self, folder: Path, base: Path) -> None:
        """Make a virtual environment that can be moved; in an existing one, make the interpreter again.

        Args:
            folder: the folder of the virtual environment.
            base: the path of the interpreter on which the virtual environment is based.

        Raises:
            BlockedError: no space is left.
            CommandError: uv has failed.
        """
        flags: list[str | Path] = [
            "--quiet",
            "--no-project",
            "--allow-existing",
            "--relocatable",
            "--prompt",
            self.final_prefix.name,
        ]
        self._run(["venv", *flags, "--python", base, folder], self.uv)

    def install(
        self, folder: Path, route: InstallRoute, version: str, packages: Sequence[LockedPackage], lock: str
    ) -> None:
        """Install the packages of a pip lock file into an environment; other packages in the environment are kept.

        Args:
            folder: the current folder of the environment.
            route: the variant of torch, and its source.
            version: the version of the environment's Python, such as "3.11.7".
            packages: the packages in the lock file.
            lock: the text of the lock file.

        Raises:
            BlockedError: no space is left, or a package is not cached and the run is offline.
            TorchError: torch could not be installed, but the other packages could.
            CommandError: uv has failed.
        """
        site = environment_marker.site_packages(folder, version)
        reasons = installed_wheels.damaged_packages(site, packages, deep=True)
        damaged = {name for name, reason in reasons.items() if reason != installed_wheels.ABSENT}
        install: list[str | Path] = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", "-"]
        install += ["--python", layout.interpreter(folder)]
        # uv skips a package that has a .dist-info folder, so each damaged package is an argument. uv unpacks such a
        # package again, so the intact packages are no arguments.
        installed_wheels.delete_damaged_records(site, damaged)
        for name in sorted(damaged):
            install += ["--reinstall-package", name]
        self._install(install, route, lock)
        reinstalled = [package for package in packages if package.name in damaged]
        still_damaged = installed_wheels.damaged_packages(site, reinstalled, deep=True)
        if still_damaged:
            # An installed file can be a hard link to the file in uv's cache, which then has the same damage.
            self._run(["cache", "clean", "--quiet", *still_damaged], self.uv)
            self._install(install, route, lock)

    def _install(self, install: Sequence[str | Path], route: InstallRoute, lock: str) -> None:
        torch, others = requirements.split(lock, {"torch"})
        if route.page is None:
            try:
                self._install_from_uv_sources(install, route.variant, lock)
            except (process.CommandError, _NotCachedError) as error:
                # uv's message does not show which package has failed. It is torch if a second run without torch
                # succeeds.
                if not torch.strip():
                    raise
                self._install_from_uv_sources(install, route.variant, others)
                raise TorchError(str(error)) from error
            return
        self._install_from_uv_sources(install, route.variant, others)
        # Only this page is used, because the sources in the host's settings do not have the pinned torch.
        environment = {name: value for name, value in self.uv.environment.items() if name != "UV_FIND_LINKS"}
        page_only = replace(self.uv, environment=environment, config={})
        try:
            self._run([*install, "--no-index", "--find-links", route.page], page_only, torch, route.variant)
        except (process.CommandError, _NotCachedError) as error:
            raise TorchError(str(error)) from error

    def _install_from_uv_sources(self, install: Sequence[str | Path], variant: Variant, lock: str) -> None:
        uv = self.sources.for_wheels(self.uv, variant, lock)
        arguments = [*install, *self.uv.flags]
        try:
            self._run(arguments, uv, lock, variant)
        except _NotCachedError:
            if uv is self.uv:
                raise
            self._run(arguments, self.uv, lock, variant)  # a package may have been cached before a mirror was chosen

    def _run(
        self,
        arguments: Sequence[str | Path],
        uv: uv_installer.UvSources,
        stdin: str | None = None,
        variant: Variant | None = None,
    ) -> None:
        """Run uv, and raise an error with the cause and the user's next step if uv fails.

        Args:
            arguments: the arguments of the command uv.
            uv: the inputs of the process.
            stdin: the text for its standard input.
            variant: the variant of torch to install; its size is in the message about a full disk.

        Raises:
            BlockedError: no space is left, or a package is not cached and the run is offline.
            CommandError: uv has failed for another reason.
        """
        needed = variant.install_bytes if variant else None
        try:
            uv_installer.run_uv(arguments, uv, stdin)
        except process.CommandError as error:
            proxy_failure = self.sources.failure()
            if re.search(r"os error 28|No space left|os error 122|Disk quota", f"{error} {proxy_failure}"):
                size = f" (about {needed:,} bytes are needed)" if needed else ""
                raise BlockedError(
                    f"{self.final_prefix}: no space left{size}. Free some space, or use another --root, then run again."
                ) from error
            if self.offline:
                reason = str(error).splitlines()[-1].strip().rstrip(".")
                raise _NotCachedError(
                    f"{self.final_prefix} cannot be completed without the network: {reason}. "
                    f"Run `{layout.next_command('setup')}` with network access."
                ) from error
            if proxy_failure is not None:
                raise process.CommandError(f"{self.final_prefix}: {proxy_failure}") from error
            raise
