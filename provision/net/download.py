"""Fetches one file over HTTP into a partial that survives a kill, from whoever delivers what is pinned."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provision.core.errors import FirstlightError
from provision.net import fetch as file_fetch
from provision.net.fetch import FetchOptions, SourceError
from provision.net.partial_file import PartialFile

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    import requests

    from provision.net.fetch import Source
    from provision.net.source_health import SourceHealth

# (connect, silence) in seconds: a source that does not answer is left quickly while there is another, and later it is
# given time.
_IMPATIENT = (3.0, 4.0)
_PATIENT = (6.0, 60.0)
_PATIENT_ROUNDS = 2
_SHORTEST_WAIT_SECONDS = 0.2
# Who is busy and says no time is sat out so often; from then on that counts as any other failure.
_MOST_UNASKED_WAITS = 5


class DownloadError(FirstlightError):
    """No source delivered; the partial stays for the next run.

    `refusals`: {source: (status, its code)} of those that show the file to some users alone; `others`: {source: why it
    did not deliver} of the rest.
    """

    kind = "source"

    def __init__(self, message: str, refusals: Mapping[str, tuple[int, str]], others: Mapping[str, str]) -> None:
        """Take what a person is told."""
        super().__init__(message)
        self.refusals = dict(refusals)
        self.others = dict(others)


class WrongContentError(FirstlightError):
    """Every source that delivers sent another content than the pinned one."""

    kind = "content"


def fetch(
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
    """Fetch a file from the first candidate that delivers what is pinned, from the last good byte on.

    A candidate that fails in the middle is followed by the next one, which goes on where it ended: the pinned hash
    holds the two together. One that sent wrong content from its first byte to its last is not asked again in the run.

    Args:
        session: carries proxies and TLS settings.
        candidates: who may deliver, the best first; asked anew each round.
        part: the partial; it stays when this fails.
        size: the file's bytes where they are known.
        pins: {kind of `hashing.content_hash`: the digests that are right}.
        health: what became of the sources; those that it bans are left out.
        progress: told the bytes that arrive.
        name: what messages call the file.

    Returns:
        The source that delivered its last byte. The file is at `part`.

    Raises:
        DownloadError: nobody delivered.
        WrongContentError: who delivered sent wrong content.
    """
    work = _Fetch(session, candidates, PartialFile(part, pins, size), health, progress, name)
    rounds = 0
    while rounds <= _PATIENT_ROUNDS:
        before, work.was_busy = work.partial.have, False
        giver = work.round(patient=bool(rounds))
        if giver is not None:
            return giver
        if not work.left():
            break
        # Whoever brings it further, or asks to be waited for, may be asked again.
        rounds += not (work.partial.have > before or work.was_busy)
    said = "; ".join(f"{source}: {why}" for source, why in work.failures.items()) or "no source has it"
    if work.wrong:
        raise WrongContentError(f"{name} was not accepted: {said}.")
    raise DownloadError(
        f"{name} could not be fetched: {said}. What arrived is kept; run again to go on.",
        work.refusals,
        {source: why for source, why in work.failures.items() if source not in work.refusals},
    )


@dataclass
class _Fetch:
    """One file on its way; `failures` of this file, `dropped` who does not have it.

    `asked` in this round; `silent` who was given time and brought nothing; `busy` who asks to be asked later.
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
    asked: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    busy: dict[str, _Busy] = field(default_factory=dict)
    was_busy: bool = False

    def left(self) -> list[Source]:
        """Who may still be asked, the best first."""
        every = [each for each in self.candidates() if each.source not in self.dropped]
        order = self.health.order(candidate.source for candidate in every)
        return sorted((each for each in every if each.source in order), key=lambda each: order.index(each.source))

    def round(self, *, patient: bool) -> str | None:
        """Ask each once that is not busy; the source that delivered, or None."""
        self.asked.clear()
        for candidate in self._ready():
            self.asked.add(candidate.source)
            before = self.partial.have
            try:
                self._ask(candidate, patient=patient)
            except SourceError as error:
                self._note(candidate.source, error)
                if patient and error.is_silence and self.partial.have == before:
                    self.silent.add(candidate.source)
                continue
            if self._is_right(candidate):
                return candidate.source
        return None

    def _ready(self) -> list[Source]:
        """Who may be asked now. Nobody is waited for while another one may have it."""
        every = self.left()
        ready = [each for each in every if not self._is_busy(each)]
        waiting = [each for each in every if each not in ready]
        # Who brought nothing although it was given time does not stand for one that asks to be waited for.
        if not waiting or any(each.source not in self.silent for each in ready):
            return ready
        first = min(waiting, key=lambda each: self.busy[each.source].until)
        busy = self.busy[first.source]
        left = max(0.0, busy.until - time.monotonic())
        if not self.health.wait(left, f"{self.name} from {first.source}", is_asked=busy.is_asked):
            self.dropped |= {each.source for each in every}
            return []
        return [first, *ready]

    def _is_busy(self, candidate: Source) -> bool:
        busy = self.busy.get(candidate.source)
        return busy is not None and busy.until > time.monotonic()

    def _is_another(self) -> bool:
        """Whether somebody else could be asked now who is not known to bring nothing."""
        return any(each.source not in self.asked | self.silent and not self._is_busy(each) for each in self.left())

    def _note(self, source: str, error: SourceError) -> None:
        """Remember what a refusal means for this file, and for the run."""
        self.failures[source] = str(error)
        if error.refusal is not None:
            self.refusals[source] = error.refusal
        if error.wait is not None:
            self._note_busy(source, error.wait)
        elif error.is_silence:
            self.health.mark_failed(source, str(error))
        elif error.is_wrong:
            self._note_wrong(source, str(error))
        else:
            self.dropped.add(source)

    def _note_busy(self, source: str, wait: float) -> None:
        """As long as it asks; twice as long each time where it asks for nothing."""
        times = self.busy[source].times if source in self.busy else 0
        own = _SHORTEST_WAIT_SECONDS * 2**times
        is_asked = wait >= own
        self.busy[source] = _Busy(time.monotonic() + max(wait, own), times + 1, is_asked)
        self.was_busy |= is_asked or times < _MOST_UNASKED_WAITS

    def _note_wrong(self, source: str, said: str) -> None:
        self.failures[source] = said
        self.wrong.add(source)
        self.health.ban(source, f"of {self.name} {said}")

    def _ask(self, candidate: Source, *, patient: bool) -> None:
        is_here = self.partial.is_whole or (self.partial.have and self.partial.wrong is None)
        if not is_here:
            patience = _PATIENT if patient else _IMPATIENT
            file_fetch.append(
                FetchOptions(self.session, self.progress, patience, self._is_another), candidate, self.partial
            )

    def _is_right(self, candidate: Source) -> bool:
        partial, source = self.partial, candidate.source
        reason = partial.wrong
        if reason is None:
            giver = source if source in partial.givers else next(iter(partial.givers), source)
            self.health.deliver(self.name, giver, partial.have, self.failures)
            return True
        if partial.givers == {source}:
            self._note_wrong(source, f"it sent {reason}")
        partial.restart()
        return False


@dataclass(frozen=True)
class _Busy:
    """Until when a source is not asked, how often it was busy, and whether it asked for this wait itself."""

    until: float
    times: int
    is_asked: bool
