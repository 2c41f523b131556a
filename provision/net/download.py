"""Downloads one file from several sources into a partial file, and resumes it after an interrupt or a failure."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provision.core.errors import FirstlightError
from provision.net import resumable_request
from provision.net.partial_file import PartialFile
from provision.net.resumable_request import FetchOptions, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    import requests

    from provision.net.resumable_request import Source
    from provision.net.source_health import SourceHealth

# (connect, read) timeouts in seconds. The first round leaves a silent source quickly for another one; the later rounds
# give each source more time.
_IMPATIENT = (3.0, 4.0)
_PATIENT = (6.0, 60.0)
_PATIENT_ROUNDS = 2
_SHORTEST_WAIT_SECONDS = 0.2
# A busy source without Retry-After is waited for this often. After that its response counts as any other failure.
_MOST_UNREQUESTED_WAITS = 5


class DownloadError(FirstlightError):
    """Report that no source delivered the file; the partial file is kept for the next run.

    `refusals` has {source: (HTTP status, error code of the hub)} of the sources that show the file to certain users
    only. `others` has {source: reason} of the other sources.
    """

    kind = "source"

    def __init__(self, message: str, refusals: Mapping[str, tuple[int, str]], others: Mapping[str, str]) -> None:
        """Take the message, and the failures of the sources."""
        super().__init__(message)
        self.refusals = dict(refusals)
        self.others = dict(others)


class WrongContentError(FirstlightError):
    """Report that every source that delivered sent content with a wrong hash."""

    kind = "content"


def download(
    session: requests.Session,
    candidates: Callable[[], Iterable[Source]],
    part: Path,
    *,
    size: int | None,
    pins: Mapping[str, Collection[str]],
    health: SourceHealth,
    progress: Callable[[int], None],
    name: str,
) -> str:
    """Download a file from the first source that delivers the pinned content, and resume a partial file.

    If a source fails in the middle, the next one continues from there; the pinned hash covers the bytes of both. A
    source that sent a whole file with wrong content is banned for the run.

    Args:
        session: the HTTP session, with its proxies and TLS settings.
        candidates: returns the possible sources, the best first; called again in each round.
        part: the path of the partial file; it is kept after a failure.
        size: the size of the file in bytes, if it is known.
        pins: {kind of `hashing.content_hash`: the pinned digests, of which one must match}.
        health: the failures of the sources in this run; banned sources are not used.
        progress: called with the number of received bytes.
        name: the name of the file in messages.

    Returns:
        The source that delivered the last byte. The complete file is at `part`.

    Raises:
        DownloadError: no source delivered.
        WrongContentError: every source that delivered sent wrong content.
    """
    work = _Fetch(session, candidates, PartialFile(part, pins, size), health, progress, name)
    rounds = 0
    while rounds <= _PATIENT_ROUNDS:
        before, work.was_busy = work.partial.have, False
        source = work.round(patient=bool(rounds))
        if source is not None:
            return source
        if not work.usable():
            break
        # A round does not count if new bytes arrived, or if a busy source requested a later retry.
        rounds += not (work.partial.have > before or work.was_busy)
    reasons = "; ".join(f"{source}: {reason}" for source, reason in work.failures.items()) or "no source has it"
    if work.wrong:
        raise WrongContentError(f"{name} was not accepted: {reasons}.")
    raise DownloadError(
        f"{name} could not be fetched: {reasons}. The received part is kept; run the same command again to resume.",
        work.refusals,
        {source: reason for source, reason in work.failures.items() if source not in work.refusals},
    )


@dataclass
class _Fetch:
    """Holds the state of one download.

    `failures` has the last reason of each failed source, and `wrong` the sources that sent wrong content. `dropped`
    are the sources that do not have the file. `tried` are the sources of this round. `silent` are those that sent
    nothing with the longer timeouts. `busy` are those that requested a later retry.
    """

    session: requests.Session
    candidates: Callable[[], Iterable[Source]]
    partial: PartialFile
    health: SourceHealth
    progress: Callable[[int], None]
    name: str
    failures: dict[str, str] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    busy: dict[str, _Busy] = field(default_factory=dict)
    was_busy: bool = False

    def usable(self) -> list[Source]:
        """Return the sources that are neither dropped nor banned, the best first."""
        sources = [source for source in self.candidates() if source.source not in self.dropped]
        order = self.health.order(source.source for source in sources)
        return sorted((item for item in sources if item.source in order), key=lambda item: order.index(item.source))

    def round(self, *, patient: bool) -> str | None:
        """Try each source that is not busy once, and return the name of the one that delivered, or None."""
        self.tried.clear()
        for candidate in self._ready():
            self.tried.add(candidate.source)
            before = self.partial.have
            try:
                self._append(candidate, patient=patient)
            except SourceError as error:
                self._record(candidate.source, error)
                if patient and error.is_transient and self.partial.have == before:
                    self.silent.add(candidate.source)
                continue
            if self._accept(candidate):
                return candidate.source
        return None

    def _ready(self) -> list[Source]:
        """Return the sources that can be tried now; wait for a busy source only if no other one may deliver."""
        sources = self.usable()
        ready = [source for source in sources if not self._is_busy(source)]
        waiting = [source for source in sources if source not in ready]
        # A source that timed out is no reason to skip the wait for a busy one.
        if not waiting or any(source.source not in self.silent for source in ready):
            return ready
        first = min(waiting, key=lambda source: self.busy[source.source].until)
        busy = self.busy[first.source]
        seconds = max(0.0, busy.until - time.monotonic())
        if not self.health.wait(seconds, f"{self.name} from {first.source}", is_requested=busy.is_requested):
            self.dropped |= {source.source for source in sources}
            return []
        return [first, *ready]

    def _is_busy(self, candidate: Source) -> bool:
        busy = self.busy.get(candidate.source)
        return busy is not None and busy.until > time.monotonic()

    def _has_alternative(self) -> bool:
        """Return whether a source is left that is not busy, was not tried in this round and has not timed out."""
        sources = self.usable()
        return any(item.source not in self.tried | self.silent and not self._is_busy(item) for item in sources)

    def _record(self, source: str, error: SourceError) -> None:
        """Record a failure for this file and, if it concerns other files too, for the run."""
        self.failures[source] = str(error)
        if error.refusal is not None:
            self.refusals[source] = error.refusal
        if error.wait is not None:
            self._record_busy(source, error.wait)
        elif error.is_transient:
            self.health.mark_failed(source, str(error))
        elif error.is_wrong:
            self._record_wrong(source, str(error))
        else:
            self.dropped.add(source)

    def _record_busy(self, source: str, wait: float) -> None:
        """Set the time of the next try: after the requested wait, or a longer one that doubles with each response."""
        times = self.busy[source].times if source in self.busy else 0
        shortest = _SHORTEST_WAIT_SECONDS * 2**times
        is_requested = wait >= shortest
        self.busy[source] = _Busy(time.monotonic() + max(wait, shortest), times + 1, is_requested)
        self.was_busy |= is_requested or times < _MOST_UNREQUESTED_WAITS

    def _record_wrong(self, source: str, reason: str) -> None:
        self.failures[source] = reason
        self.wrong.add(source)
        self.health.ban(source, f"{self.name}: {reason}")

    def _append(self, candidate: Source, *, patient: bool) -> None:
        is_complete = self.partial.is_whole or (self.partial.have and self.partial.wrong is None)
        if not is_complete:
            timeouts = _PATIENT if patient else _IMPATIENT
            resumable_request.append(
                FetchOptions(self.session, self.progress, timeouts, self._has_alternative), candidate, self.partial
            )

    def _accept(self, candidate: Source) -> bool:
        """Record a correct file and return True; else delete it, ban the source if it sent all bytes, return False."""
        partial, source = self.partial, candidate.source
        reason = partial.wrong
        if reason is None:
            deliverer = source if source in partial.sources else next(iter(partial.sources), source)
            self.health.deliver(self.name, deliverer, partial.have, self.failures)
            return True
        if partial.sources == {source}:
            self._record_wrong(source, f"it sent {reason}")
        partial.restart()
        return False


@dataclass(frozen=True)
class _Busy:
    """Hold the time until which a source is not tried, the number of its busy responses, and the origin of the wait.

    `is_requested` is False if the source has not requested this wait with Retry-After.
    """

    until: float
    times: int
    is_requested: bool
