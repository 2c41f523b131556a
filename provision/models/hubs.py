"""Where an environment's packages come from in one run: this machine's own settings, else the chosen mirrors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.mirrors import record as mirror_record
from provision.mirrors.official import official_endpoint
from provision.mirrors.record import OFFICIAL
from provision.mirrors.tools.hf import Hf
from provision.models.hub_client import Hub

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from provision.core.layout import Root


class Hubs:
    """The hubs that models may come from, the best first. Each is asked at most once for a sign of life."""

    def __init__(
        self,
        root: Root,
        environ: Mapping[str, str],
        *,
        offline: bool = False,
        token_hosts: Collection[str] = (),
        endpoint: str | None = None,
    ) -> None:
        """Take the volume, whose choice is followed unless the machine names a hub itself (HF_ENDPOINT).

        `token_hosts`: hosts that may see the user's token besides the official one. `endpoint`: this hub alone.
        """
        self.root = root
        self.endpoint = endpoint
        self.token_hosts = token_hosts
        self.environ = environ
        self.offline = offline
        self._known: dict[str, Hub] = {}

    def every(self) -> list[Hub]:
        """The machine's own hub alone, else the chosen ones with the official one among them.

        Raises:
            SpecError: HF_ENDPOINT is no address that is taken.
        """
        if self.endpoint is not None:
            return [self._hub(self.endpoint, None)]
        record = mirror_record.read(self.root) or mirror_record.MirrorRecord()
        own = Hf().own_endpoint(self.environ, record)
        if own:
            return [self._hub(own, None)]
        named = [self._hub(source.url, source.name) for source in record.sources(Hf.name) if not source.is_official]
        official = self._hub(official_endpoint(), OFFICIAL)
        first = record.chosen(Hf.name).is_official
        return [official, *named] if first else [*named, official]

    def _hub(self, endpoint: str, name: str | None) -> Hub:
        if endpoint not in self._known:
            self._known[endpoint] = Hub(
                self.environ, offline=self.offline, endpoint=endpoint, name=name, token_hosts=self.token_hosts
            )
        return self._known[endpoint]
