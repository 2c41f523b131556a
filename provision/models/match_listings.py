"""Compares the listings of hubs with the pins, and selects the hub of each file."""

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
    """Compares the listings of hubs with the pins of one model, for one pull.

    `name` is the name of the model in messages. `trust`: also accept a mirror's hash for a
    file without a pinned hash.
    """

    root: Root
    name: str
    manifest: ModelSpec
    health: SourceHealth
    trust: bool
    spec: ModelSpec = field(init=False)

    def __post_init__(self) -> None:
        """Read the recorded pins."""
        self._listings: dict[str, dict[str, ListedFile]] = {}
        self.apply_pins()

    def apply_pins(self) -> None:
        """Read the recorded pins again.

        Pins of the manifest take precedence. Hashes that only a mirror has supplied are provisional.
        """
        self.spec = pins.apply(self.root, self.manifest)
        self._manifest_files = {file.path: file for file in self.manifest.files}
        recorded = {file.path for file in self.spec.files if file.locked and not self._manifest_files[file.path].locked}
        by_mirrors = pins.by_mirrors(self.root, self.manifest)
        self.provisional = {path: mirror for path, mirror in by_mirrors.items() if path in recorded}

    def is_unconfirmed(self, file: ModelFile) -> bool:
        """Return whether a file has no pinned hash, or a hash that only a mirror has supplied."""
        return not file.locked or file.path in self.provisional

    def resolve(
        self, files: Sequence[ModelFile], hubs: Sequence[Hub]
    ) -> tuple[list[tuple[ModelFile, ListedFile]], list[Hub]]:
        """Find each file in the listings of the hubs; wait for busy hubs if only they may have it.

        Args:
            files: the files to find.
            hubs: the hubs to use.

        Returns:
            As `resolve_once`.

        Raises:
            BusyError, HubError, FirstlightError: as for `resolve_once`; BusyError after the wait limit of the run.
        """
        ordered = list(hubs)
        if any(self.is_unconfirmed(file) for file in files):
            ordered.sort(key=lambda hub: not hub.is_official)  # its hashes are worth more than a faster mirror
        while True:
            try:
                return self.resolve_once(files, ordered, hubs)
            except BusyError as error:
                if not self.health.wait(error.wait, f"{self.name}: {error}"):
                    raise

    def resolve_once(
        self, files: Sequence[ModelFile], hubs: Sequence[Hub], every: Sequence[Hub]
    ) -> tuple[list[tuple[ModelFile, ListedFile]], list[Hub]]:
        """Find each file in the listings of the hubs; each file comes from the first hub that lists it as pinned.

        A hub that lists one file with another size or hash is banned for all files. Hashes of files without a pin are
        recorded.

        Returns:
            ([(file, its listing)] in the order of `files`, all hubs, those that list the files first).

        Args:
            files: the files to find.
            hubs: the hubs whose listings are read, in this order.
            every: the hubs that may deliver the files.

        Raises:
            BusyError: a hub is busy that may list the missing files.
            HubError: no hub lists all files.
            FirstlightError: a hub lists other content than the pinned one.
        """
        matches: dict[str, tuple[ModelFile, ListedFile]] = {}
        used: list[tuple[Hub, list[ListedFile]]] = []
        failures: list[HubError] = []
        mismatch: FirstlightError | None = None
        for hub in hubs:
            try:
                hub_matches, missing = self._match_listing(hub, [file for file in files if file.path not in matches])
            except HubError as error:
                failures.append(error)
            except FirstlightError as error:
                self.health.ban(hub.name, str(error))
                mismatch = error
            else:
                matches |= {file.path: (file, listed_file) for file, listed_file in hub_matches}
                failures += missing
                used += (
                    [(hub, [listed_file for file, listed_file in hub_matches if not file.locked])]
                    if hub_matches
                    else []
                )
            if len(matches) == len(files):
                break
        else:
            raise self._failure(failures, mismatch)
        for hub, unpinned in used:
            if unpinned:
                pins.keep(self.root, self.manifest, unpinned, hub.name)
        preferred = [hub for hub, _ in used]
        return [matches[file.path] for file in files], [*preferred, *(hub for hub in every if hub not in preferred)]

    def _failure(self, failures: Sequence[HubError], mismatch: FirstlightError | None) -> FirstlightError:
        """Return the error if not all files were found.

        A busy hub has priority over a mismatch, because the busy one may list the right content.
        """
        busy = [failure for failure in failures if isinstance(failure, BusyError)]
        if busy:
            return min(busy, key=lambda failure: failure.wait)
        if mismatch is not None:
            return mismatch
        return (
            failures[0]
            if len(failures) == 1
            else HubError("; ".join(map(str, failures)) or "the official hub is not used in this run")
        )

    def _match_listing(
        self, hub: Hub, files: Sequence[ModelFile]
    ) -> tuple[list[tuple[ModelFile, ListedFile]], list[HubError]]:
        """Return the files that a hub lists as pinned, and the first failure if some are missing."""
        listing = self._listing(hub)
        matches: list[tuple[ModelFile, ListedFile]] = []
        failures: list[HubError] = []
        for file in files:
            try:
                matches.append(self._check_pin(file, listing, hub))
            except HubError as error:
                failures.append(error)
        return matches, failures[:1]

    def _listing(self, hub: Hub) -> dict[str, ListedFile]:
        if hub.endpoint not in self._listings:
            self._listings[hub.endpoint] = hub.listing(self.spec.repo, self.spec.revision)
        return self._listings[hub.endpoint]

    def _check_pin(self, file: ModelFile, listing: dict[str, ListedFile], hub: Hub) -> tuple[ModelFile, ListedFile]:
        if hub.is_official and file.path in self.provisional:  # its hash replaces the mirror's
            file = self._manifest_files[file.path]
        listed = listing.get(file.path)
        if listed is None:
            raise HubError(f"{hub.shown} does not have {file.path} of {self.spec.repo}")
        if not file.locked and not hub.is_official and not self.trust:
            raise HubError(
                f"{file.path} has no pinned hash, and {hub.shown} is not the official hub. Pull it from the official "
                "hub, or accept this mirror's hash with --trust-mirror"
            )
        listed_values = {"size": listed.size, listed.kind: listed.blob}
        for key, value in listed_values.items():
            pin = getattr(file, key)
            if pin is not None and pin != value:
                raise FirstlightError(
                    f"{hub.shown} lists {file.path} of {self.spec.repo} with {key} {value}, "
                    f"pinned is {pin}. The file was not fetched. Use another hub: HF_ENDPOINT=URL"
                )
        return file, listed
