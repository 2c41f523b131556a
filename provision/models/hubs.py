"""Selects the hubs from which models are pulled: HF_ENDPOINT alone, or the chosen mirrors and the official hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.mirrors import chosen_mirrors
from provision.mirrors.chosen_mirrors import OFFICIAL
from provision.mirrors.official import official_endpoint
from provision.mirrors.tools.hf import Hf
from provision.models.hub_client import Hub

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from provision.core.layout import Root


class Hubs:
    """Holds the hubs of one run, so that a hub that failed to connect is not contacted again in this run."""

    def __init__(
        self,
        root: Root,
        environ: Mapping[str, str],
        *,
        offline: bool = False,
        token_hosts: Collection[str] = (),
        endpoint: str | None = None,
    ) -> None:
        """Store the settings.

        Args:
            root: the root, which has the record of the chosen mirrors.
            environ: the environment variables.
            offline: make no request.
            token_hosts: the hosts besides the official hub to which the user's token may be sent.
            endpoint: the URL of the only hub to use; None: as `every` describes.
        """
        self.root = root
        self.endpoint = endpoint
        self.token_hosts = token_hosts
        self.environ = environ
        self.offline = offline
        self._hubs: dict[str, Hub] = {}

    def every(self) -> list[Hub]:
        """Return the hubs to use, the best first.

        If `endpoint` is given, or the user has set HF_ENDPOINT, that hub is the only one. Otherwise they are the chosen
        mirrors and the official hub; the official hub is first if it was chosen, else last.

        Raises:
            SpecError: HF_ENDPOINT is not an allowed URL.
        """
        if self.endpoint is not None:
            return [self._hub(self.endpoint, None)]
        record = chosen_mirrors.read(self.root) or chosen_mirrors.MirrorRecord()
        own_endpoint = Hf().own_endpoint(self.environ, record)
        if own_endpoint:
            return [self._hub(own_endpoint, None)]
        mirrors = [self._hub(source.url, source.name) for source in record.sources(Hf.name) if not source.is_official]
        official = self._hub(official_endpoint(), OFFICIAL)
        is_official_first = record.chosen(Hf.name).is_official
        return [official, *mirrors] if is_official_first else [*mirrors, official]

    def _hub(self, endpoint: str, name: str | None) -> Hub:
        if endpoint not in self._hubs:
            self._hubs[endpoint] = Hub(
                self.environ, offline=self.offline, endpoint=endpoint, name=name, token_hosts=self.token_hosts
            )
        return self._hubs[endpoint]
