"""The chain of sources for a build of torch: this machine's own, the variant's pages, then the build that stands in."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from provision.core import bootstrap_wait, layout, process
from provision.core.errors import BlockedError, FirstlightError
from provision.environments import torch_sources
from provision.installers import pip_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from provision.config.torch import Variant
    from provision.core.layout import Root
    from provision.environments.package_sources import PackageSources
    from provision.environments.torch_sources import PinnedPackage
    from provision.installers.uv import UvSources

_OWN = "this machine's own sources"
_UNPACKED = 1.8  # times its download, an environment takes on disk: 5.13 GB of 2.84 (cu130, measured)


class TorchError(process.CommandError):
    """Torch alone could not be installed; the rest of the lock could."""


@dataclass(frozen=True)
class InstallRoute:
    """One way to a build of torch. `page`: the address that torch alone is taken from; None: uv's own sources.

    `source` is what messages call it.
    """

    variant: Variant
    page: str | None
    source: str

    @property
    def key(self) -> tuple[str, str | None]:
        """Return the key of a way: uv uses all its own sources together."""
        return self.variant.name, self.page


@dataclass
class InstallRoutes:
    """The ways to install an environment, the best first; each source is asked, and asked again after a failure.

    `variants`: the wanted one, then what stands in for it. `pins`: the torch that a variant's lock pins, or None where
    it pins none. `seconds`: how long a source may take to answer. `settled`: the variant whose torch is installed.
    """

    supply: PackageSources
    uv: UvSources
    variants: Sequence[Variant]
    pins: Callable[[Variant], PinnedPackage | None]
    seconds: float
    settled: Variant | None = None
    passed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with no way tried."""
        self._failed: dict[tuple[str, str | None], str] = {}
        self._way: InstallRoute | None = None

    @property
    def way(self) -> InstallRoute:
        """The way that is taken now; the first time, the sources are asked for it."""
        if self._way is None:
            self._way = self._next() or InstallRoute(self.variants[0], None, _OWN)
        return self._way

    def _next(self) -> InstallRoute | None:
        """Return the best way that has not failed yet, or None; `passed` then says why the others were not taken."""
        if self.is_settled and self.settled is not None:
            return InstallRoute(self.settled, None, _OWN)
        self.passed = []
        for variant in self.variants:
            ways, reasons = self._ways(variant)
            self.passed += reasons
            for way in ways:
                if way.key not in self._failed:
                    return way
                self.passed.append(f"{way.source}: {self._failed[way.key]}")
        # No source is known to have it. Our look may be wrong, so the installer has the last word.
        last = InstallRoute(self.variants[0], None, _OWN)
        return None if last.key in self._failed else last

    def follow(
        self, attempt: Callable[[InstallRoute], None], ready: Callable[[], None], tell: Callable[[str], None]
    ) -> Variant:
        """Install by the first way that works, and return its variant.

        Args:
            attempt: installs; raises TorchError where torch, and nothing else, could not be had.
            ready: announces every further way before it is tried, and raises where it cannot be taken.
            tell: told why a way failed.

        Raises:
            FirstlightError: every way failed.
        """
        errors: list[TorchError] = []
        while True:
            way = self.way
            try:
                attempt(way)
            except TorchError as error:
                errors.append(error)
                self._failed[way.key] = _last_line(error)
                tell(f"torch {way.variant.torch} could not be installed from {way.source}: {_last_line(error)}")
            else:
                return way.variant
            self._way = self._next()
            if self._way is None:
                raise self._exhausted(errors[0])
            ready()

    @property
    def is_settled(self) -> bool:
        """Return whether the installed torch stays, so that nothing is fetched."""
        return self.settled is not None and not self._failed

    def announce(self, root: Root) -> str:
        """Return the line for the way that is taken: the source, the bytes, and the space that is left."""
        way, wanted = self.way, self.variants[0]
        text = f"torch {way.variant.torch} from {way.source}"
        if way.variant.name != wanted.name:
            reasons = "; ".join(self.passed)
            text = f"torch {wanted.torch} cannot be had: {reasons}. Instead {text} ({wanted.instead_cost})"
        return f"{text}{sizes(way.variant)}; {_gigabytes(_free(root))} free"

    def _exhausted(self, error: TorchError) -> FirstlightError:
        if self.supply.offline:
            return BlockedError(str(error))
        return FirstlightError(
            f"torch {self.variants[0].torch} cannot be had: {'; '.join(self.passed)}. Name a folder or page that has "
            f"it, then run again: PIP_FIND_LINKS=… {layout.program()} setup. The installer's own words:\n{error}"
        )

    def _ways(self, variant: Variant) -> tuple[list[InstallRoute], list[str]]:
        """Return the ways to a variant, the best first, and the reasons against the other sources."""
        pinned = self.pins(variant)
        if pinned is None:
            return [InstallRoute(variant, None, _OWN)], []
        pages = self.supply.torch_places(variant)
        if self.supply.offline:
            own = InstallRoute(variant, None, "the cache")
            return [own, *(InstallRoute(variant, page.url, f"the cache of {page.name}") for page in pages)], []
        own_places = self.supply.places(self.uv, variant)
        session = partial(pip_settings.session, self.supply.environ, self.supply.settings)
        insecure = self.uv.environment.get("UV_INSECURE_HOST", "")
        answers = torch_sources.ask([*own_places, *pages], pinned, session, self.seconds, insecure)
        reasons = [f"{each.place.name} {each.reason}" for each in answers if not each.has]
        ways = []
        own_answers = answers[: len(own_places)]
        sure = next((each.place for each in own_answers if each.has), None)
        if sure is not None or any(each.has is None for each in own_answers):
            ways.append(InstallRoute(variant, None, sure.name if sure else _OWN))
        # A page that did not answer clearly may answer the installer: 503 for a moment is no reason for gigabytes more.
        page_answers = answers[len(own_places) :]
        asked = [each for each in page_answers if each.has] + [each for each in page_answers if each.is_unclear]
        return ways + [InstallRoute(variant, each.place.url, each.place.name) for each in asked], reasons


def sizes(variant: Variant) -> str:
    """Return what a variant costs, such as ": about 0.4 GB to download, 1.0 GB on disk", as far as it is known."""
    parts = []
    if variant.download_bytes is not None:
        parts.append(f"{_gigabytes(variant.download_bytes)} to download")
    if variant.install_bytes is not None:
        parts.append(f"{_gigabytes(variant.install_bytes)} on disk")
    return f": about {', '.join(parts)}" if parts else ""


def need_space(variant: Variant, name: str, root: Root, cache: Path) -> None:
    """Check that an environment fits the volume.

    Raises:
        BlockedError: it does not.
    """
    needed = variant.install_bytes
    if needed is None and variant.download_bytes is not None:
        needed = round(variant.download_bytes * _UNPACKED)
    if needed is None:
        return
    root.path.mkdir(parents=True, exist_ok=True)
    free = _free(root)
    if free < needed and cache.exists() and cache.stat().st_dev == root.path.stat().st_dev:
        # What uv has unpacked there already is linked, not copied.
        needed -= bootstrap_wait.tree_bytes([str(cache / "archive-v0")])
    if free < needed:
        raise BlockedError(
            f"{root.path}: {free:,} bytes are free, about {needed:,} are needed for {name} "
            f"({variant.name}{sizes(variant)}). Free some, or give another --root, then run again."
        )


def _free(root: Root) -> int:
    place = root.path
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _last_line(error: FirstlightError) -> str:
    return str(error).strip().splitlines()[-1].strip().rstrip(".")
