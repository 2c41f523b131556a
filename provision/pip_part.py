"""The pip part of an environment, installed by uv: every package by hash, what is harmed put anew."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision import command, paths, prefix, sources, wheels
from provision.errors import BlockedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.errors import FirstlightError
    from provision.spec import Variant
    from provision.supply import Supply
    from provision.wheels import Locked


@dataclass(frozen=True)
class PipPart:
    """How uv is started for one environment; `place` is what messages call it, `needed` the bytes that it takes."""

    place: Path
    uv: sources.UvSources
    supply: Supply
    offline: bool
    needed: int | None

    def venv(self, where: Path, base: Path) -> None:
        """Make, or make anew, a virtual environment that may be moved as a whole.

        Raises:
            BlockedError: no space is left.
            CommandError: uv failed.
        """
        flags: list[str | Path] = ["--quiet", "--allow-existing", "--relocatable", "--prompt", self.place.name]
        self._run(["venv", *flags, "--python", base, where], self.uv)

    def install(self, where: Path, variant: Variant, version: str, wanted: Sequence[Locked], asked: str) -> None:
        """Make an environment hold what a lock asks for; what else is in it stays.

        Args:
            where: the environment as it lies now.
            variant: the build of torch.
            version: of its python, such as "3.11.7".
            wanted: the packages.
            asked: the lock's text.

        Raises:
            BlockedError: no space is left; or, offline, a package is not in the cache.
            CommandError: uv failed.
        """
        site = prefix.site_packages(where, version)
        found = wheels.harmed_packages(site, wanted, deep=True)
        harmed = {name for name, reason in found.items() if reason != wheels.ABSENT}
        install: list[str | Path] = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", "-"]
        install += [*self.uv.flags, "--python", paths.interpreter(where)]
        # uv trusts a .dist-info folder: a package whose files are harmed has to be named. Only then: what is named is
        # unpacked again.
        for name in sorted(harmed):
            install += ["--reinstall-package", name]
        uv = self.supply.for_wheels(self.uv, variant, asked)
        try:
            self._run(install, uv, asked)
        except (command.CommandError, BlockedError) as error:
            if uv is not self.uv:
                if not self.offline:
                    raise
                uv = self.uv  # it may have been fetched before there was a mirror
                self._run(install, uv, asked)
            elif torch_is_missing(variant, error):
                uv = self._with_torch(install, variant, asked, error)
            else:
                raise
        mended = [package for package in wanted if package.name in harmed]
        spread = wheels.harmed_packages(site, mended, deep=True)
        if spread:
            # An installed file is a hard link into uv's cache: harm to the one is harm to the other.
            self._run(["cache", "clean", "--quiet", *spread], uv)
            self._run(install, uv, asked)

    def _with_torch(
        self, install: Sequence[str | Path], variant: Variant, asked: str, error: FirstlightError
    ) -> sources.UvSources:
        """Install with the pages that list this build of torch, one after another: its hash is pinned."""
        for page in self.supply.torch_pages(variant):
            links = ",".join(filter(None, [self.uv.environment.get("UV_FIND_LINKS"), page]))
            uv = sources.UvSources(self.uv.environment | {"UV_FIND_LINKS": links}, self.uv.flags)
            try:
                self._run(install, uv, asked)
            except command.CommandError as missing:
                if not (torch_is_missing(variant, missing) or page in str(missing)):
                    raise
                error = missing
            else:
                return uv
        raise error

    def _run(self, arguments: Sequence[str | Path], uv: sources.UvSources, stdin: str | None = None) -> None:
        try:
            command.run([sources.uv_binary(), *arguments], env=uv.environment, stdin=stdin)
        except command.CommandError as error:
            ours = self.supply.failure()
            if re.search(r"os error 28|No space left|os error 122|Disk quota", f"{error} {ours}"):
                wanted = f" (about {self.needed:,} bytes are needed)" if self.needed else ""
                raise BlockedError(
                    f"{self.place}: no space left{wanted}. Free some, or give another --root, then run again."
                ) from error
            if self.offline:
                reason = str(error).splitlines()[-1].strip().rstrip(".")
                raise BlockedError(
                    f"{self.place} cannot be made whole without the network: {reason}. Run `make setup`."
                ) from error
            if ours is not None:
                raise command.CommandError(f"{self.place}: {ours}") from error
            raise


def torch_is_missing(variant: Variant, error: FirstlightError) -> bool:
    """Whether uv failed because no source offers this build of torch, or its page did not answer."""
    text = str(error)
    if any(each in text for each in (f"torch=={variant.torch}", f"torch-{variant.torch}", "no source lists torch")):
        return True
    return bool(variant.find_links and variant.find_links in text)
