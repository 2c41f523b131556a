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

# (connect, read) timeouts in seconds. A round tries each source once. The first round has short timeouts, so that a
# source that sends nothing is soon replaced by the next one. The later rounds give each source more time.
_SHORT_TIMEOUTS = (3.0, 4.0)
_LONG_TIMEOUTS = (6.0, 60.0)
_LONG_ROUNDS = 2  # the largest number of rounds with long timeouts that bring no new bytes
_SHORTEST_WAIT_SECONDS = 0.2  # the first wait for a busy source that sends no Retry-After
# The number of waits for a busy source that sends no Retry-After. A later busy response counts as any other failure.
_MOST_UNREQUESTED_WAITS = 5


class DownloadError(FirstlightError):
    """Report that no source delivered the file; the partial file is kept for the next run.

    `refusals`: {name of source: (HTTP status, value of the header X-Error-Code)} of the sources that denied access
    (401 or 403). `others`: {name of source: reason} of the other sources that failed.
    """

    kind = "source"

    def __init__(self, message: str, refusals: Mapping[str, tuple[int, str]], others: Mapping[str, str]) -> None:
        """Store the message and the failures, which the class describes."""
        super().__init__(message)
        self.refusals = dict(refusals)
        self.others = dict(others)


class WrongContentError(FirstlightError):
    """Report that no source delivered the file, and that at least one sent a whole file with a wrong hash."""

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

    If a source fails in the middle of the file, the next source continues at the same byte. The pinned hash is
    compared with the whole file, so it covers the bytes of every source. A source that alone sent a whole file with
    wrong content is banned for the run.

    Args:
        session: the HTTP session, with its proxies and TLS settings.
        candidates: a function that returns the possible sources, the best first; called again in each round.
        part: the path of the partial file; it is kept after a failure.
        size: the size that the file must have, in bytes; None if it is not known.
        pins: {kind of hash, as for `hashing.content_hash`: the allowed digests in hex}; one digest of each kind must
            match.
        health: the failures of the sources in this run; banned sources are not used.
        progress: called with the number of bytes in each received block.
        name: the name of the file in messages.

    Returns:
        The name of the source with which the download ended. The complete file is at `part`.

    Raises:
        DownloadError: no source delivered the file, and none sent wrong content.
        WrongContentError: no source delivered the pinned content, and at least one sent wrong content.
    """
    work = _Fetch(session, candidates, PartialFile(part, pins, size), health, progress, name)
    rounds = 0
    while rounds <= _LONG_ROUNDS:
        before, work.was_busy = work.partial.have, False
        source = work.try_sources(has_long_timeouts=bool(rounds))
        if source is not None:
            return source
        if not work.usable():
            break
        # A round does not count if new bytes arrived, or if a busy source is to be tried again after a wait.
        rounds += not (work.partial.have > before or work.was_busy)
    reasons = "; ".join(f"{source}: {reason}" for source, reason in work.failures.items()) or "no source has the file"
    if work.wrong:
        raise WrongContentError(f"{name} was not accepted: {reasons}.")
    raise DownloadError(
        f"{name} could not be downloaded: {reasons}. The received part is kept; run the same command again to resume.",
        work.refusals,
        {source: reason for source, reason in work.failures.items() if source not in work.refusals},
    )


@dataclass
class _Fetch:
    """Holds the state of one download; all its sets and dictionaries have the names of sources.

    `session` to `name`: the arguments of `download`; `partial` is the partial file at its `part`.
    `failures`: {source: the reason of its last failure}.
    `wrong`: the sources that sent wrong content.
    `dropped`: the sources that are not tried again for this file, most of them because they do not have it.
    `refusals`: {source: (HTTP status, error code)} of the sources that denied access.
    `tried`: the sources that were tried in this round.
    `silent`: the sources that failed in a round with long timeouts without sending a byte.
    `busy`: {source: the time of its next try} of the sources that answered with a busy status, such as 503.
    `was_busy`: in this round a source was busy that is to be tried again after a wait.
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

    def try_sources(self, *, has_long_timeouts: bool) -> str | None:
        """Try each source that is not busy once.

        Returns:
            The name of the source that delivered the file; None if none did.
        """
        self.tried.clear()
        for candidate in self._ready():
            self.tried.add(candidate.source)
            before = self.partial.have
            try:
                self._append(candidate, _LONG_TIMEOUTS if has_long_timeouts else _SHORT_TIMEOUTS)
            except SourceError as error:
                self._record(candidate.source, error)
                if has_long_timeouts and error.is_transient and self.partial.have == before:
                    self.silent.add(candidate.source)
                continue
            if self._accept(candidate):
                return candidate.source
        return None

    def _ready(self) -> list[Source]:
        """Return the sources that can be tried now, the best first.

        If each source is busy or has sent no byte within the long timeouts, wait for the busy source whose wait ends
        first, and put it at the front. If that wait would exceed the limit of the run, drop all sources and return [].
        """
        sources = self.usable()
        ready = [source for source in sources if not self._is_busy(source)]
        waiting = [source for source in sources if source not in ready]
        # A source that sent no byte within the long timeouts most likely fails again, so a busy one is waited for.
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
        """Return whether another source can be tried now.

        Such a source is not busy, was not tried in this round, and has not failed to send a byte within the long
        timeouts.
        """
        sources = self.usable()
        return any(item.source not in self.tried | self.silent and not self._is_busy(item) for item in sources)

    def _record(self, source: str, error: SourceError) -> None:
        """Record the failure of a source for this file.

        A timeout, a broken connection or wrong content is recorded for the whole run too, since it concerns each file
        of the source.
        """
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
        """Record the time at which a busy source is tried again.

        The wait is `wait`, the seconds of Retry-After, but at least 0.2 s, doubled with each busy response.
        """
        times = self.busy[source].times if source in self.busy else 0
        shortest = _SHORTEST_WAIT_SECONDS * 2**times
        is_requested = wait >= shortest
        self.busy[source] = _Busy(time.monotonic() + max(wait, shortest), times + 1, is_requested)
        self.was_busy |= is_requested or times < _MOST_UNREQUESTED_WAITS

    def _record_wrong(self, source: str, reason: str) -> None:
        self.failures[source] = reason
        self.wrong.add(source)
        self.health.ban(source, f"{self.name}: {reason}")

    def _append(self, candidate: Source, timeouts: tuple[float, float]) -> None:
        """Request the missing bytes from a source, unless the partial file is complete already."""
        is_complete = self.partial.has_pinned_size or (self.partial.have and self.partial.mismatch is None)
        if not is_complete:
            resumable_request.append(
                FetchOptions(self.session, self.progress, timeouts, self._has_alternative), candidate, self.partial
            )

    def _accept(self, candidate: Source) -> bool:
        """Return whether the downloaded file has the pinned hashes.

        A correct file is recorded as delivered. A wrong file is deleted, and its source is banned if all bytes came
        from that source.
        """
        partial, source = self.partial, candidate.source
        reason = partial.mismatch
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
    """Describe the wait for a busy source.

    `until`: the time at which the source is tried again, by `time.monotonic()`.
    `times`: the number of busy responses of the source so far.
    `is_requested`: the source has requested this wait with Retry-After.
    """

    until: float
    times: int
    is_requested: bool
