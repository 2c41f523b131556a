"""Selects the sources of an environment's packages, and runs the failover proxy for uv and rattler.

A source is an index, a conda channel, or a page with links to files (find-links).
"""

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
    """Selects the sources of packages for one run; packages are installed inside of a `with` block of `open`.

    `root`: the root, with the record of the chosen mirrors. `environ`: the environment variables.
    `home`: the user's home folder, with the settings of pip and conda. `journal`: the journal of the run.
    `offline`: make no request. `progress`: called with (bytes received, bytes expected).
    `health`: the record of the deliveries and failures of the mirrors in this run.
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
        """Return the settings of this host for pip, uv and conda; the settings of pip are read once."""
        return MachineSettings(self.environ, self.home)

    @property
    def settings(self) -> dict[str, list[str]]:
        """Return {option of pip: its values} on this host; the first call takes a quarter of a second."""
        return self.machine.pip

    @property
    def _record(self) -> chosen_mirrors.MirrorRecord:
        return chosen_mirrors.read(self.root) or chosen_mirrors.MirrorRecord()

    def wheel_sources(self, variant: Variant) -> list[MirrorSource]:
        """Return the sources of wheels for the failover proxy, the best first.

        The list is empty if uv needs no failover proxy: no mirror is chosen, the user has set an index, or every source
        is official.

        Args:
            variant: the variant of torch to install.
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
        # The health of a source is recorded under its name. A mirror whose index fails may still serve torch, so the
        # page with torch has a name of its own.
        return [*named, *(replace(source, name=f"{source.name} (torch)") for source in torch_pages)]

    def torch_sources(self, variant: Variant) -> list[MirrorSource]:
        """Return the pages with the variant's build of torch, such as 2.13.0+cpu, the best first.

        They are the pages of the chosen mirrors and the official page; none if the variant's torch is on an index.
        """
        if variant.find_links is None:
            return []
        official = MirrorSource(OFFICIAL, variant.find_links, "find-links")
        pages = [official if source.is_official else source for source in self._record.sources(Torch.name)]
        return pages if official in pages else [*pages, official]

    def uv_sources(self, uv: uv_installer.UvSources, variant: Variant) -> list[TorchSource]:
        """Return all sources from which uv installs, directly or through the failover proxy.

        Args:
            uv: the inputs of uv, with the sources in the host's settings.
            variant: the variant of torch to install.
        """
        mirrors = self.wheel_sources(variant)
        if not mirrors:
            return own_sources(uv)
        own = own_sources(replace(uv, flags=("--no-index",)))
        return [*own, *(TorchSource(f"the mirror {mirror.name}", mirror.url, mirror.kind) for mirror in mirrors)]

    def torch_pages(self, variant: Variant) -> list[TorchSource]:
        """Return the pages from which only torch is installed, the best first.

        There are none if the failover proxy uses these pages for all packages.
        """
        if self.wheel_sources(variant) and not self.offline:
            return []
        return [
            TorchSource(f"the page {redact(source.url)}", Torch.page(source), "find-links")
            for source in self.torch_sources(variant)
        ]

    def conda_sources(self) -> list[MirrorSource]:
        """Return the sources of conda packages, the best first; none if the user's conda settings have a mirror."""
        record = self._record
        if Conda().own_setting(self.machine, record):
            return []
        return [source for source in record.sources(Conda.name) if source.is_official or source.channels]

    def unreachable(self, packages: Sequence[CondaPackage]) -> str | None:
        """Return, as text, why no source serves the conda packages; None if one does, or without packages.

        One of the packages is requested from each source until a source serves it.
        """
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
        """Run the failover proxy inside of a `with` block if a mirror is used and the run is not offline.

        At the end of the block, the deliveries and warnings of the sources are written to the journal.

        Args:
            variant: the variant of torch to install.
        """
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
        """Return the inputs with which uv installs the packages of a pip lock file.

        If the failover proxy runs, uv downloads through it. If the run is offline, uv uses only files that the proxy
        has cached.

        Args:
            uv: the inputs of uv, with the sources in the host's settings.
            variant: the variant of torch in the lock file.
            lock: the text of the lock file.
        """
        mirrors = self.wheel_sources(variant)
        if mirrors and self.offline:
            return replace(uv, environment=cached_only(uv.environment))
        if not mirrors or self._proxy is None:
            return uv
        self._proxy.wheels(requirements.hashes(lock), mirrors)
        return replace(uv, environment=self._proxy.environment(uv.environment))

    def for_conda(self, packages: Sequence[CondaPackage]) -> dict[str, str]:
        """Return {official URL of a channel: URL of its mirror or of the failover proxy}, the mirrors for rattler.

        Args:
            packages: the packages to install.
        """
        sources = self.conda_sources()
        if self._proxy is None or not any(not source.is_official for source in sources):
            return conda_settings.mirrors(self.environ, self.home)
        return self._proxy.conda(packages, sources)

    def failure(self) -> str | None:
        """Return, as text, why the failover proxy could not serve files; None if it has served all, or does not run.

        The installer's own message does not have these reasons.
        """
        return "; ".join(self._proxy.failures.values()) if self._proxy and self._proxy.failures else None
