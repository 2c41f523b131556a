"""Finds the files of a model in the listings of hubs, and compares the listed sizes and hashes with the pinned ones."""

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
    """Finds the files of one model in the listings of hubs, for one pull.

    `root`: the root, which has the record of hashes that earlier pulls took from listings.
    `name`: the name of the model in messages.
    `manifest`: the entry of the manifest. `spec`: the same entry, with the recorded sizes and hashes added.
    `health`: the failures of the sources in this run.
    `trust`: accept a mirror's hash too for a file without a pinned hash.
    """

    root: Root
    name: str
    manifest: ModelSpec
    health: SourceHealth
    trust: bool
    spec: ModelSpec = field(init=False)

    def __post_init__(self) -> None:
        """Read the recorded sizes and hashes."""
        self._listings: dict[str, dict[str, ListedFile]] = {}
        self.apply_pins()

    def apply_pins(self) -> None:
        """Add the recorded sizes and hashes to `spec`, and set `provisional`.

        Sizes and hashes in the manifest take precedence. `provisional` is {path: name of the mirror} of the files
        whose hash only a mirror has listed; the official hub can replace it.
        """
        self.spec = pins.apply(self.root, self.manifest)
        self._manifest_files = {file.path: file for file in self.manifest.files}
        recorded = {file.path for file in self.spec.files if file.locked and not self._manifest_files[file.path].locked}
        by_mirrors = pins.by_mirrors(self.root, self.manifest)
        self.provisional = {path: mirror for path, mirror in by_mirrors.items() if path in recorded}

    def is_unconfirmed(self, file: ModelFile) -> bool:
        """Return whether a file has no pinned hash, or a hash that only a mirror has listed."""
        return not file.locked or file.path in self.provisional

    def resolve(
        self, files: Sequence[ModelFile], hubs: Sequence[Hub]
    ) -> tuple[list[tuple[ModelFile, ListedFile]], list[Hub]]:
        """Find each file in the listings of the hubs.

        If a file is in no listing and a hub is busy, wait and try again. If a file has no pinned hash, or one that only
        a mirror has listed, the official hub comes first.

        Args:
            files: the files to find.
            hubs: the hubs to use, the best first.

        Returns:
            As `resolve_once`.

        Raises:
            BusyError: a further wait would exceed the limit of the run.
            HubError, FirstlightError: as for `resolve_once`.
        """
        ordered = list(hubs)
        if any(self.is_unconfirmed(file) for file in files):
            ordered.sort(key=lambda hub: not hub.is_official)  # its hashes matter more than a faster mirror
        while True:
            try:
                return self.resolve_once(files, ordered, hubs)
            except BusyError as error:
                if not self.health.wait(error.wait, f"{self.name}: {error}"):
                    raise

    def resolve_once(
        self, files: Sequence[ModelFile], hubs: Sequence[Hub], every: Sequence[Hub]
    ) -> tuple[list[tuple[ModelFile, ListedFile]], list[Hub]]:
        """Find each file in the listings of the hubs, without a wait.

        The first hub that lists a file with the pinned size and hash supplies the row for that file. A hub that lists
        one file with another size or hash is banned for all files. The hashes of files without a pin are recorded.

        Args:
            files: the files to find.
            hubs: the hubs whose listings are read, in this order, until all files are found.
            every: all hubs that may deliver the files.

        Returns:
            ([(file, its row in a listing)] in the order of `files`, `every` with the hubs of these rows moved to the
            front).

        Raises:
            BusyError: a file is in no listing, and a hub is busy.
            HubError: a file is in no listing.
            FirstlightError: a file is in no listing, and a hub lists a file with another size or hash than the pinned.
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
        """Return the error to raise if a file was not found.

        A busy hub has priority over a wrong size or hash, because the busy hub may list the right content.

        Args:
            failures: the errors of hubs that are unavailable or do not have a file.
            mismatch: the error of the last hub that lists another size or hash; None without one.
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
        """Compare files with the listing of one hub.

        Returns:
            ([(file, its row)] of the files in the listing, [the error for the first file that is not accepted] or []).

        Raises:
            HubError: the hub has no listing.
            FirstlightError: the hub lists a file with another size or hash than the pinned.
        """
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
        if hub.is_official and file.path in self.provisional:  # the official hash replaces the mirror's
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
                    f"but the pinned {key} is {pin}. The file was not downloaded. Use another hub: HF_ENDPOINT=URL"
                )
        return file, listed
