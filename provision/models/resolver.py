"""What hubs list of a model, held against what is pinned: whom to ask first, and whose word counts for what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provision.core.errors import FirstlightError
from provision.models import pins
from provision.models.hub_client import BusyError, HubError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from provision.config.models import ModelFile, ModelSpec
    from provision.core.layout import Root
    from provision.models.hub_client import Hub, ListedFile
    from provision.net.source_health import SourceHealth


@dataclass
class FileResolver:
    """The questions of one pull. `name` is what messages call the model.

    `trust`: also take a mirror's word for what nobody has pinned.
    """

    root: Root
    name: str
    manifest: ModelSpec
    health: SourceHealth
    trust: bool
    spec: ModelSpec = field(init=False)

    def __post_init__(self) -> None:
        """Know what is on record of its hashes."""
        self._listings: dict[str, dict[str, ListedFile]] = {}
        self.apply_pins()

    def apply_pins(self) -> None:
        """What the manifest pins stays as it is; of the rest, what a mirror's word alone stands for is provisional."""
        self.spec = pins.apply(self.root, self.manifest)
        self._said = {file.path: file for file in self.manifest.files}
        pinned_now = {file.path for file in self.spec.files if file.locked and not self._said[file.path].locked}
        by_mirrors = pins.by_mirrors(self.root, self.manifest)
        self.provisional = {path: mirror for path, mirror in by_mirrors.items() if path in pinned_now}

    def is_doubted(self, file: ModelFile) -> bool:
        """Whether nobody has pinned a file, or nobody but a mirror."""
        return not file.locked or file.path in self.provisional

    def patiently(
        self, wanted: Sequence[ModelFile], hubs: Sequence[Hub]
    ) -> tuple[list[tuple[ModelFile, ListedFile]], list[Hub]]:
        """Of every hub; where the only ones that may have it are busy, as long as they ask to wait."""
        ordered = list(hubs)
        if any(self.is_doubted(file) for file in wanted):
            ordered.sort(key=lambda hub: not hub.is_official)  # its word is worth more than a way that is short
        while True:
            try:
                return self.once(wanted, ordered, hubs)
            except BusyError as error:
                if not self.health.wait(error.wait, f"{self.name}: {error}"):
                    raise

    def once(
        self, wanted: Sequence[ModelFile], hubs: Sequence[Hub], every: Sequence[Hub]
    ) -> tuple[list[tuple[ModelFile, ListedFile]], list[Hub]]:
        """Each file as the first hub lists it that lists it as pinned; those hubs come first among those to be asked.

        A hub that lists one file otherwise is not believed for the others.

        Args:
            wanted: the files.
            hubs: those that are asked for their listing, in this order.
            every: those that may deliver the files.

        Raises:
            BusyError: a hub that may list what is missing asks to be asked later.
            HubError: nobody lists all of it.
            FirstlightError: who does lists other content than the pinned one.
        """
        found: dict[str, tuple[ModelFile, ListedFile]] = {}
        asked: list[tuple[Hub, list[ListedFile]]] = []
        silent: list[HubError] = []
        wrong: FirstlightError | None = None
        for hub in hubs:
            try:
                listed, lacking = self._listed(hub, [file for file in wanted if file.path not in found])
            except HubError as error:
                silent.append(error)
            except FirstlightError as error:
                self.health.ban(hub.name, str(error))
                wrong = error
            else:
                found |= {file.path: (file, each) for file, each in listed}
                silent += lacking
                asked += [(hub, [each for file, each in listed if not file.locked])] if listed else []
            if len(found) == len(wanted):
                break
        else:
            raise self._lack(silent, wrong)
        for hub, fresh in asked:
            if fresh:
                pins.keep(self.root, self.manifest, fresh, hub.name)
        first = [hub for hub, _ in asked]
        return [found[file.path] for file in wanted], [*first, *(hub for hub in every if hub not in first)]

    def _lack(self, silent: Sequence[HubError], wrong: FirstlightError | None) -> FirstlightError:
        """Why not all is listed. Whoever asks for time may be the honest one: that goes before another one's word."""
        busy = [each for each in silent if isinstance(each, BusyError)]
        if busy:
            return min(busy, key=lambda each: each.wait)
        if wrong is not None:
            return wrong
        return silent[0] if len(silent) == 1 else HubError("; ".join(map(str, silent)) or "no official hub is asked")

    def _listed(
        self, hub: Hub, wanted: Sequence[ModelFile]
    ) -> tuple[list[tuple[ModelFile, ListedFile]], list[HubError]]:
        """What a hub lists of these files, and why not more."""
        listing = self._listing(hub)
        found: list[tuple[ModelFile, ListedFile]] = []
        lacking: list[HubError] = []
        for file in wanted:
            try:
                found.append(self._pinned(file, listing, hub))
            except HubError as error:
                lacking.append(error)
        return found, lacking[:1]

    def _listing(self, hub: Hub) -> dict[str, ListedFile]:
        if hub.endpoint not in self._listings:
            self._listings[hub.endpoint] = hub.listing(self.spec.repo, self.spec.revision)
        return self._listings[hub.endpoint]

    def _pinned(self, file: ModelFile, listing: dict[str, ListedFile], hub: Hub) -> tuple[ModelFile, ListedFile]:
        if hub.is_official and file.path in self.provisional:  # its word goes before a mirror's
            file = self._said[file.path]
        listed = listing.get(file.path)
        if listed is None:
            raise HubError(f"{hub.shown} does not have {file.path} of {self.spec.repo}")
        if not file.locked and not hub.is_official and not self.trust:
            raise HubError(
                f"{file.path} is not pinned yet, and {hub.shown} is not the official hub: pull it from there, or "
                "take this one's word with --trust-mirror"
            )
        offered = {"size": listed.size, listed.kind: listed.blob}
        for what, offer in offered.items():
            pin = getattr(file, what)
            if pin is not None and pin != offer:
                raise FirstlightError(
                    f"{hub.shown} lists {file.path} of {self.spec.repo} with {what} {offer}, "
                    f"pinned is {pin}. It was not fetched. Use another endpoint: HF_ENDPOINT=…"
                )
        return file, listed
