"""Where the packages of an environment come from, the best source first."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from provision.core.redact import redact
from provision.environments.torch_sources import TorchSource, own_places
from provision.installers import conda_settings, pip_settings, rattler
from provision.installers import uv as uv_installer
from provision.lockfiles import requirements
from provision.mirrors import record as mirror_record
from provision.mirrors.failover_proxy import FailoverProxy, cached_only
from provision.mirrors.record import OFFICIAL, MirrorSource
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
    """What one run knows of its sources. `open` it while packages are fetched.

    `progress` is told the bytes that arrive, and how many will.
    """

    root: Root
    environ: Mapping[str, str]
    home: Path
    journal: Journal
    offline: bool
    progress: Callable[[int, int], None]
    health: SourceHealth = field(default_factory=SourceHealth)
    _relay: FailoverProxy | None = None

    @cached_property
    def machine(self) -> MachineSettings:
        """Return the settings of this machine."""
        return MachineSettings(self.environ, self.home)

    @property
    def settings(self) -> dict[str, list[str]]:
        """This machine's pip settings; asking for them takes a quarter of a second."""
        return self.machine.pip

    @property
    def _record(self) -> mirror_record.MirrorRecord:
        return mirror_record.read(self.root) or mirror_record.MirrorRecord()

    def wheel_sources(self, variant: Variant) -> list[MirrorSource]:
        """Whom a relay asks for wheels; nobody where the machine's own settings or the official index serve alone."""
        record = self._record
        chosen = record.sources(Pip.name)
        if not chosen or Pip().own_setting(self.machine, record):
            return []
        own_builds = self.torch_sources(variant)
        if all(source.is_official for source in (*chosen, *own_builds)):
            return []
        named = [replace(each, url=pip_settings.official_index()) if each.is_official else each for each in chosen]
        # One name, one standing: who fails as an index of wheels may still hold the builds of torch.
        return [*named, *(replace(each, name=f"{each.name} (torch)") for each in own_builds)]

    def torch_sources(self, variant: Variant) -> list[MirrorSource]:
        """Where a build such as 2.13.0+cpu lies, the chosen mirror first, the official page among them."""
        if variant.find_links is None:
            return []
        official = MirrorSource(OFFICIAL, variant.find_links, "find-links")
        chosen = [official if each.is_official else each for each in self._record.sources(Torch.name)]
        return chosen if official in chosen else [*chosen, official]

    def places(self, uv: uv_installer.UvSources, variant: Variant) -> list[TorchSource]:
        """Return every source that uv is given, the mirrors behind a relay among them."""
        mirrors = self.wheel_sources(variant)
        if not mirrors:
            return own_places(uv)
        own = own_places(replace(uv, flags=("--no-index",)))
        return [*own, *(TorchSource(f"the mirror {each.name}", each.url, each.kind) for each in mirrors)]

    def torch_places(self, variant: Variant) -> list[TorchSource]:
        """Return the pages that torch alone may be taken from; none where a relay has them among its mirrors."""
        if self.wheel_sources(variant) and not self.offline:
            return []
        return [
            TorchSource(f"the page {redact(each.url)}", Torch.page(each), "find-links")
            for each in self.torch_sources(variant)
        ]

    def conda_sources(self) -> list[MirrorSource]:
        """Whom to ask for conda's packages, the best first; nobody where the machine's conda names its own mirror."""
        record = self._record
        if Conda().own_setting(self.machine, record):
            return []
        return [each for each in record.sources(Conda.name) if each.is_official or each.channels]

    def unreachable(self, packages: Sequence[CondaPackage]) -> str | None:
        """Why conda's packages cannot be fetched from anywhere, asked with one of them; None when they can."""
        asked = self.conda_sources()
        if not asked:
            return rattler.unreachable(packages, conda_settings.mirrors(self.environ, self.home))
        reasons = []
        for source in asked:
            mirrored = {f"{conda_settings.CHANNELS}/{name}/": f"{url}/" for name, url in source.channels.items()}
            reason = rattler.unreachable(packages, mirrored)
            if reason is None:
                return None
            reasons.append(reason)
        return "; ".join(reasons)

    @contextmanager
    def open(self, variant: Variant) -> Iterator[None]:
        """Have a relay where there are mirrors; in the end its health goes to the journal."""
        mirrored = any(not each.is_official for each in (*self.wheel_sources(variant), *self.conda_sources()))
        if self.offline or not mirrored:
            yield
            return
        session = pip_settings.session(self.environ, self.settings)
        with FailoverProxy(session, self.root.cache / "arriving", self.health, self.progress) as running:
            self._relay = running
            try:
                yield
                running.finish()
            finally:
                self._relay = None
                for name, source, size in self.health.delivered:
                    self.journal.record(PackageDownload(name, source, size))
                for text in self.health.warnings():
                    self.journal.record(MirrorWarning(redact(text)))

    def for_wheels(self, uv: uv_installer.UvSources, variant: Variant, asked: str) -> uv_installer.UvSources:
        """How uv is started to install what a lock's text asks for."""
        from_mirrors = self.wheel_sources(variant)
        if from_mirrors and self.offline:
            return replace(uv, environment=cached_only(uv.environment))
        if not from_mirrors or self._relay is None:
            return uv
        self._relay.wheels(requirements.hashes(asked), from_mirrors)
        return replace(uv, environment=self._relay.environment(uv.environment))

    def for_conda(self, packages: Sequence[CondaPackage]) -> dict[str, str]:
        """{channel's own address: who serves it}, as rattler takes it."""
        asked = self.conda_sources()
        if self._relay is None or not any(not each.is_official for each in asked):
            return conda_settings.mirrors(self.environ, self.home)
        return self._relay.conda(packages, asked)

    def failure(self) -> str | None:
        """Why a file did not come, in our words: the installer knows only that we did not serve it."""
        return "; ".join(self._relay.failures.values()) if self._relay and self._relay.failures else None
