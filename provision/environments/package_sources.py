"""Selects the sources of an environment's packages, and serves them to uv and rattler through the failover proxy."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from provision.core.redact import redact
from provision.environments.torch_sources import TorchSource, own_sources
from provision.installers import conda_settings, pip_settings, rattler
from provision.installers import uv as uv_installer
from provision.lockfiles import requirements
from provision.mirrors import chosen_mirrors
from provision.mirrors.chosen_mirrors import OFFICIAL, MirrorSource
from provision.mirrors.failover_proxy import FailoverProxy, cached_only
from provision.mirrors.tools.conda import Conda
from provision.mirrors.tools.pip import Pip
from provision.mirrors.tools.tool import MachineSettings
from provision.mirrors.tools.torch import Torch
from provision.net.source_health import SourceHealth
from provision.volume.journal_acts import MirrorWarning, PackageDownload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from provision.config.torch import Variant
    from provision.core.layout import Root
    from provision.lockfiles.conda_lock import CondaPackage
    from provision.volume.journal import Journal


@dataclass
class PackageSources:
    """Selects the sources of packages for one run; packages are installed within `open`.

    `home` has the settings of pip and conda. `progress` receives (bytes received, bytes expected). `health` records the
    failures and deliveries of the mirrors.
    """

    root: Root
    environ: Mapping[str, str]
    home: Path
    journal: Journal
    offline: bool
    progress: Callable[[int, int], None]
    health: SourceHealth = field(default_factory=SourceHealth)
    _proxy: FailoverProxy | None = None

    @cached_property
    def machine(self) -> MachineSettings:
        """Return the variables and the home with this machine's own settings; pip's are read once."""
        return MachineSettings(self.environ, self.home)

    @property
    def settings(self) -> dict[str, list[str]]:
        """Return this machine's pip settings; reading them takes a quarter of a second."""
        return self.machine.pip

    @property
    def _record(self) -> chosen_mirrors.MirrorRecord:
        return chosen_mirrors.read(self.root) or chosen_mirrors.MirrorRecord()

    def wheel_sources(self, variant: Variant) -> list[MirrorSource]:
        """Return the sources of wheels for the failover proxy, the best first.

        The list is empty if uv needs no proxy: no mirror is chosen, the machine has its own pip settings, or every
        source is official.
        """
        record = self._record
        indexes = record.sources(Pip.name)
        if not indexes or Pip().own_setting(self.machine, record):
            return []
        torch_pages = self.torch_sources(variant)
        if all(source.is_official for source in (*indexes, *torch_pages)):
            return []
        named = [
            replace(source, url=pip_settings.official_index()) if source.is_official else source for source in indexes
        ]
        # The health of a source is recorded by its name. A mirror that fails as an index may still serve torch.
        return [*named, *(replace(source, name=f"{source.name} (torch)") for source in torch_pages)]

    def torch_sources(self, variant: Variant) -> list[MirrorSource]:
        """Return the pages with a build such as 2.13.0+cpu: the chosen mirrors, and the official page."""
        if variant.find_links is None:
            return []
        official = MirrorSource(OFFICIAL, variant.find_links, "find-links")
        pages = [official if source.is_official else source for source in self._record.sources(Torch.name)]
        return pages if official in pages else [*pages, official]

    def uv_sources(self, uv: uv_installer.UvSources, variant: Variant) -> list[TorchSource]:
        """Return all sources from which uv installs, including the mirrors behind the failover proxy."""
        mirrors = self.wheel_sources(variant)
        if not mirrors:
            return own_sources(uv)
        own = own_sources(replace(uv, flags=("--no-index",)))
        return [*own, *(TorchSource(f"the mirror {mirror.name}", mirror.url, mirror.kind) for mirror in mirrors)]

    def torch_pages(self, variant: Variant) -> list[TorchSource]:
        """Return the pages from which only torch is installed; none if the failover proxy already uses them."""
        if self.wheel_sources(variant) and not self.offline:
            return []
        return [
            TorchSource(f"the page {redact(source.url)}", Torch.page(source), "find-links")
            for source in self.torch_sources(variant)
        ]

    def conda_sources(self) -> list[MirrorSource]:
        """Return the sources of conda packages, the best first; none if the machine's conda settings name a mirror."""
        record = self._record
        if Conda().own_setting(self.machine, record):
            return []
        return [source for source in record.sources(Conda.name) if source.is_official or source.channels]

    def unreachable(self, packages: Sequence[CondaPackage]) -> str | None:
        """Return the reason why no source serves the conda packages, or None; each source is tried with one package."""
        sources = self.conda_sources()
        if not sources:
            return rattler.unreachable(packages, conda_settings.mirrors(self.environ, self.home))
        reasons = []
        for source in sources:
            mirrors = {f"{conda_settings.CHANNELS}/{name}/": f"{url}/" for name, url in source.channels.items()}
            reason = rattler.unreachable(packages, mirrors)
            if reason is None:
                return None
            reasons.append(reason)
        return "; ".join(reasons)

    @contextmanager
    def open(self, variant: Variant) -> Iterator[None]:
        """Run the failover proxy if a mirror is used; at the end, write deliveries and warnings to the journal."""
        has_mirror = any(not source.is_official for source in (*self.wheel_sources(variant), *self.conda_sources()))
        if self.offline or not has_mirror:
            yield
            return
        session = pip_settings.session(self.environ, self.settings)
        with FailoverProxy(session, self.root.cache / "arriving", self.health, self.progress) as proxy:
            self._proxy = proxy
            try:
                yield
                proxy.finish()
            finally:
                self._proxy = None
                for name, source, size in self.health.delivered:
                    self.journal.record(PackageDownload(name, source, size))
                for text in self.health.warnings():
                    self.journal.record(MirrorWarning(redact(text)))

    def for_wheels(self, uv: uv_installer.UvSources, variant: Variant, lock: str) -> uv_installer.UvSources:
        """Return the settings with which uv installs the packages of a lock, through the failover proxy if needed.

        Args:
            uv: the settings with this machine's own sources.
            variant: the variant of torch in the lock.
            lock: the text of the lock.
        """
        mirrors = self.wheel_sources(variant)
        if mirrors and self.offline:
            return replace(uv, environment=cached_only(uv.environment))
        if not mirrors or self._proxy is None:
            return uv
        self._proxy.wheels(requirements.hashes(lock), mirrors)
        return replace(uv, environment=self._proxy.environment(uv.environment))

    def for_conda(self, packages: Sequence[CondaPackage]) -> dict[str, str]:
        """Return {official URL of a channel: URL of its mirror or of the failover proxy}, as rattler takes it."""
        sources = self.conda_sources()
        if self._proxy is None or not any(not source.is_official for source in sources):
            return conda_settings.mirrors(self.environ, self.home)
        return self._proxy.conda(packages, sources)

    def failure(self) -> str | None:
        """Return the proxy's reasons for files that it could not serve, or None; the installer does not see them."""
        return "; ".join(self._proxy.failures.values()) if self._proxy and self._proxy.failures else None
