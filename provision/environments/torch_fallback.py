"""Selects the variant of torch to install, and the source from which it is installed.

For each variant, the sources in the host's settings of pip and uv come first, then the pages with its builds. If none
of them has torch, a fallback variant is selected.
"""

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
# The size of an environment on disk per byte of its download: 5.13 GB / 2.84 GB, measured with cu130.
_UNPACKED = 1.8


class TorchError(process.CommandError):
    """Report that torch could not be installed, but the other packages of the lock file could."""


@dataclass(frozen=True)
class InstallRoute:
    """Describe how torch is installed: its variant and its source.

    `page`: the URL of the page from which only torch is installed; None: torch is installed from the same sources as
    the other packages.
    `source`: the name of the source in messages.
    """

    variant: Variant
    page: str | None
    source: str

    @property
    def key(self) -> tuple[str, str | None]:
        """Return (name of the variant, page), which identifies the route.

        All sources without a page of their own have the same key, because uv uses them together.
        """
        return self.variant.name, self.page


@dataclass
class InstallRoutes:
    """Selects the best route for an environment, and another route after a failure; each selection queries the sources.

    `sources`: the sources of packages in this run. `uv`: the inputs of uv, with the sources in the host's settings.
    `variants`: the chosen variant first, then its fallbacks.
    `pins`: returns the torch that the lock file of a variant pins; None if it pins none.
    `seconds`: the timeout of a query.
    `installed`: the variant whose torch is installed and undamaged; None without one.
    `rejections`: a text for each source that does not have torch, or from which the installation has failed.
    """

    sources: PackageSources
    uv: UvSources
    variants: Sequence[Variant]
    pins: Callable[[Variant], PinnedPackage | None]
    seconds: float
    installed: Variant | None = None
    rejections: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Set that no route has failed, and that no route is selected."""
        self._failed: dict[tuple[str, str | None], str] = {}
        self._route: InstallRoute | None = None

    @property
    def route(self) -> InstallRoute:
        """Return the selected route. The first call queries the sources."""
        if self._route is None:
            self._route = self._next() or InstallRoute(self.variants[0], None, _OWN)
        return self._route

    def _next(self) -> InstallRoute | None:
        """Return the best route that has not failed, or None; set `rejections` to a text for each other source."""
        if self.is_installed and self.installed is not None:
            return InstallRoute(self.installed, None, _OWN)
        self.rejections = []
        for variant in self.variants:
            routes, reasons = self._routes(variant)
            self.rejections += reasons
            for route in routes:
                if route.key not in self._failed:
                    return route
                self.rejections.append(f"{route.source}: {self._failed[route.key]}")
        # No query has found torch. A query can be wrong, so uv is run once with its own sources before an error is
        # raised.
        last = InstallRoute(self.variants[0], None, _OWN)
        return None if last.key in self._failed else last

    def follow(
        self, attempt: Callable[[InstallRoute], None], ready: Callable[[], None], report: Callable[[str], None]
    ) -> Variant:
        """Install by one route after another until a route succeeds, and return its variant.

        Args:
            attempt: a function that installs by a route, and raises TorchError if only torch could not be installed.
            ready: called before each further route; it raises BlockedError if the environment does not fit the disk.
            report: called with a text for the user after each failed route.

        Raises:
            FirstlightError: every route has failed.
        """
        errors: list[TorchError] = []
        while True:
            route = self.route
            try:
                attempt(route)
            except TorchError as error:
                errors.append(error)
                self._failed[route.key] = _last_line(error)
                report(f"torch {route.variant.torch} could not be installed from {route.source}: {_last_line(error)}")
            else:
                return route.variant
            self._route = self._next()
            if self._route is None:
                raise self._exhausted(errors[0])
            ready()

    @property
    def is_installed(self) -> bool:
        """Return whether torch is installed already and no route has failed; then torch is not downloaded."""
        return self.installed is not None and not self._failed

    def announce(self, root: Root) -> str:
        """Return a line for the user: the selected source of torch, its size, and the free space of the root."""
        route, first = self.route, self.variants[0]
        text = f"torch {route.variant.torch} from {route.source}"
        if route.variant.name != first.name:
            reasons = "; ".join(self.rejections)
            text = f"torch {first.torch} is not available: {reasons}. Fallback: {text} ({first.instead_cost})"
        return f"{text}{sizes(route.variant)}; {_gigabytes(_free_bytes(root))} free"

    def _exhausted(self, error: TorchError) -> FirstlightError:
        if self.sources.offline:
            return BlockedError(str(error))
        return FirstlightError(
            f"torch {self.variants[0].torch} is not available: {'; '.join(self.rejections)}. Set a folder or page with "
            f"this torch: PIP_FIND_LINKS=FOLDER_OR_URL {layout.program()} setup. The installer's message:\n{error}"
        )

    def _routes(self, variant: Variant) -> tuple[list[InstallRoute], list[str]]:
        """Return ([route to install a variant], [text about a source that does not have it]), the best route first."""
        pinned = self.pins(variant)
        if pinned is None:
            return [InstallRoute(variant, None, _OWN)], []
        pages = self.sources.torch_pages(variant)
        if self.sources.offline:
            cache = InstallRoute(variant, None, "the cache")
            return [cache, *(InstallRoute(variant, page.url, f"the cache of {page.name}") for page in pages)], []
        uv_sources = self.sources.uv_sources(self.uv, variant)
        session = partial(pip_settings.session, self.sources.environ, self.sources.settings)
        insecure = self.uv.environment.get("UV_INSECURE_HOST", "")
        answers = torch_sources.query_all([*uv_sources, *pages], pinned, session, self.seconds, insecure)
        reasons = [f"{answer.source.name} {answer.reason}" for answer in answers if not answer.has]
        routes = []
        uv_answers = answers[: len(uv_sources)]
        source = next((answer.source for answer in uv_answers if answer.has), None)
        if source is not None or any(answer.has is None for answer in uv_answers):
            routes.append(InstallRoute(variant, None, source.name if source else _OWN))
        # A page whose answer is unclear, such as 503, is tried before a fallback variant: it may soon be available, and
        # the fallback may be gigabytes larger.
        page_answers = answers[len(uv_sources) :]
        usable = [answer for answer in page_answers if answer.has]
        usable += [answer for answer in page_answers if answer.is_unclear]
        return routes + [InstallRoute(variant, answer.source.url, answer.source.name) for answer in usable], reasons


def sizes(variant: Variant) -> str:
    """Return the known sizes of a variant, such as ": about 0.4 GB to download, 1.0 GB on disk"; "" without any."""
    parts = []
    if variant.download_bytes is not None:
        parts.append(f"{_gigabytes(variant.download_bytes)} to download")
    if variant.install_bytes is not None:
        parts.append(f"{_gigabytes(variant.install_bytes)} on disk")
    return f": about {', '.join(parts)}" if parts else ""


def need_space(variant: Variant, name: str, root: Root, cache: Path) -> None:
    """Check that the root has enough free space for an environment.

    Args:
        variant: the variant of torch, with the size of the environment; if no size is known, nothing is checked.
        name: the name of the environment in the message.
        root: the root; its folder is made if it does not exist.
        cache: uv's cache. If it is on the root's file system, packages that are unpacked in it need no further space.

    Raises:
        BlockedError: there is not enough space.
    """
    needed = variant.install_bytes
    if needed is None and variant.download_bytes is not None:
        needed = round(variant.download_bytes * _UNPACKED)
    if needed is None:
        return
    root.path.mkdir(parents=True, exist_ok=True)
    free = _free_bytes(root)
    if free < needed and cache.exists() and cache.stat().st_dev == root.path.stat().st_dev:
        # uv hard-links the packages that are unpacked in its cache.
        needed -= bootstrap_wait.tree_bytes([str(cache / "archive-v0")])
    if free < needed:
        raise BlockedError(
            f"{root.path}: {free:,} bytes are free, about {needed:,} are needed for {name} "
            f"({variant.name}{sizes(variant)}). Free some space, or use another --root, then run again."
        )


def _free_bytes(root: Root) -> int:
    folder = root.path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _last_line(error: FirstlightError) -> str:
    return str(error).strip().splitlines()[-1].strip().rstrip(".")
