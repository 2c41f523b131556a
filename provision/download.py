"""Fetches one file over HTTP into a partial that survives a kill, from whoever delivers what is pinned."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from provision import bodies, digests
from provision.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import requests

    from provision.digests import Hash
    from provision.ledger import Ledger

# (connect, silence) in seconds: a source that does not answer is left quickly while there is another, and later it is
# given time.
_IMPATIENT = (3.0, 4.0)
_PATIENT = (6.0, 60.0)
_PATIENT_ROUNDS = 2
_SHORTEST_WAIT_SECONDS = 0.2
# A hub that counts requests lets one in again after five minutes; who asks for more than ten is not waited for.
LONGEST_WAIT_SECONDS = 600.0
_NO_ACCESS = {401, 403}
_BUSY = {429, 500, 502, 503, 504}
# A source that sends less than this over so long is left while there is another.
_SLOWEST_BYTES, _SLOWEST_SECONDS = 100_000, 5.0


class DownloadError(FirstlightError):
    """No source delivered; the partial stays for the next run.

    `refusals`: {source: (status, its code)} of those that show the file to some users alone.
    """

    def __init__(self, message: str, refusals: Mapping[str, tuple[int, str]] | None = None) -> None:
        """Take what a person is told."""
        super().__init__(message)
        self.refusals = dict(refusals or {})


class WrongContentError(FirstlightError):
    """Every source that delivers sent another content than the pinned one."""


@dataclass(frozen=True)
class Candidate:
    """One place that may deliver a file: whose it is, where, and what is sent along."""

    source: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Partial:
    """A file that arrives: its bytes on disk, and the digests of them. A stored one is hashed before it is added to."""

    def __init__(self, path: Path, kinds: Sequence[str], size: int | None) -> None:
        """Take what an earlier run has left; `size` is the whole file's, where it is known (git's hash needs it)."""
        if path.is_symlink():  # somebody else's: whatever it leads to is not ours to write
            path.unlink()
        self.path = path
        self.size = size
        self.is_size_pinned = size is not None
        self.kinds = kinds
        self.givers: set[str] = set()
        self.have = path.stat().st_size if path.exists() else 0
        if size is not None and self.have > size:
            self.restart()
        else:
            self.digests = self._fresh()
            if self.have:
                self.givers.add("an earlier run")
                for digest in self.digests.values():
                    digests.add_file(path, digest)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are here, right or wrong."""
        return self.size is not None and self.have == self.size and self.path.exists()

    def restart(self) -> None:
        """Forget every byte."""
        self.path.unlink(missing_ok=True)
        self.have = 0
        self.givers.clear()
        self.digests = self._fresh()

    def add(self, blocks: Iterator[bytes | memoryview], source: str, progress: Callable[[int], None]) -> None:
        """Append what arrives, and nothing beyond the size that is right."""
        with open(self.path, "ab", opener=_no_link) as file:
            for block in blocks:
                if self.size is not None and self.have + len(block) > self.size:
                    raise _RefusedError(f"it sends more than the {self.size:,} bytes that are right")
                file.write(block)
                self.givers.add(source)
                self.have += len(block)
                for digest in self.digests.values():
                    digest.update(block)
                progress(len(block))

    def wrong(self, pins: Mapping[str, Collection[str]]) -> str | None:
        """Which hash is not a pinned one, or None."""
        for kind, right in pins.items():
            found = self.digests[kind].hexdigest()
            if found not in right:
                pinned = next(iter(right)) if len(right) == 1 else f"one of {len(right)}"
                return f"content with {kind} {found}, pinned is {pinned}"
        return None

    def _fresh(self) -> dict[str, Hash]:
        return {kind: digests.content_hash(kind, self.size or 0) for kind in self.kinds}


def fetch(
    session: requests.Session,
    candidates: Callable[[], Iterable[Candidate]],
    part: Path,
    *,
    size: int | None,
    pins: Mapping[str, Collection[str]],
    ledger: Ledger,
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
        pins: {kind of `digests.content_hash`: the digests that are right}.
        ledger: what became of the sources; those that it bans are left out.
        progress: told the bytes that arrive.
        name: what messages call the file.

    Returns:
        The source that delivered its last byte. The file is at `part`.

    Raises:
        DownloadError: nobody delivered.
        WrongContentError: who delivered sent wrong content.
    """
    work = _Fetch(session, candidates, Partial(part, tuple(pins), size), pins, ledger, progress, name)
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
        f"{name} could not be fetched: {said}. What arrived is kept; run again to go on.", work.refusals
    )


@dataclass
class _Fetch:
    """One file on its way; `failures` of this file, `dropped` who does not have it."""

    session: requests.Session
    candidates: Callable[[], Iterable[Candidate]]
    partial: Partial
    pins: Mapping[str, Collection[str]]
    ledger: Ledger
    progress: Callable[[int], None]
    name: str
    failures: dict[str, str] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    busy: dict[str, tuple[float, int]] = field(default_factory=dict)
    was_busy: bool = False

    def left(self) -> list[Candidate]:
        """Who may still be asked, the best first."""
        every = [each for each in self.candidates() if each.source not in self.dropped]
        order = self.ledger.order(candidate.source for candidate in every)
        return sorted((each for each in every if each.source in order), key=lambda each: order.index(each.source))

    def round(self, *, patient: bool) -> str | None:
        """Ask each once that is not busy; the source that delivered, or None."""
        asked = self._ready()
        for candidate in asked:
            try:
                self._ask(candidate, patient=patient, hurry=not patient and candidate is not asked[-1])
            except _RefusedError as error:
                self.failures[candidate.source] = str(error)
                if error.refusal is not None:
                    self.refusals[candidate.source] = error.refusal
                if error.wait is not None:
                    self._note_busy(candidate.source, error.wait)
                elif error.is_silence:
                    self.ledger.trouble(candidate.source, str(error))
                else:
                    self.dropped.add(candidate.source)
                continue
            if self._is_right(candidate):
                return candidate.source
        return None

    def _ready(self) -> list[Candidate]:
        """Who may be asked now. Nobody is waited for while another one may have it."""
        every = self.left()
        now = time.monotonic()
        ready = [each for each in every if self.busy.get(each.source, (0.0, 0))[0] <= now]
        if ready or not every:
            return ready
        first = min(every, key=lambda each: self.busy[each.source][0])
        if not self.ledger.wait(self.busy[first.source][0] - now, f"{self.name} from {first.source}"):
            self.dropped |= {each.source for each in every}
            return []
        return [first]

    def _note_busy(self, source: str, wait: float) -> None:
        """As long as it asks; twice as long each time where it asks for nothing."""
        times = self.busy.get(source, (0.0, 0))[1]
        wait = max(wait, _SHORTEST_WAIT_SECONDS * 2**times)
        self.busy[source] = (time.monotonic() + wait, times + 1)
        self.was_busy = True

    def _ask(self, candidate: Candidate, *, patient: bool, hurry: bool) -> None:
        is_here = self.partial.is_whole or (self.partial.have and self.partial.wrong(self.pins) is None)
        if not is_here:
            patience = _PATIENT if patient else _IMPATIENT
            _append(self.session, candidate, self.partial, patience, self.progress, hurry=hurry)

    def _is_right(self, candidate: Candidate) -> bool:
        partial, source = self.partial, candidate.source
        reason = partial.wrong(self.pins)
        if reason is None:
            giver = source if source in partial.givers else next(iter(partial.givers), source)
            self.ledger.deliver(self.name, giver, partial.have, self.failures)
            return True
        if partial.givers == {source}:
            self.failures[source] = f"it sent {reason}"
            self.wrong.add(source)
            self.ledger.ban(source, f"of {self.name} it sent {reason}")
        partial.restart()
        return False


class _RefusedError(Exception):
    """One candidate did not deliver: it was silent, or busy for `wait` seconds, or else does not have the file."""

    def __init__(
        self,
        reason: str,
        *,
        is_silence: bool = False,
        wait: float | None = None,
        refusal: tuple[int, str] | None = None,
    ) -> None:
        super().__init__(reason)
        self.refusal = refusal
        self.is_silence = is_silence
        self.wait = wait


def _append(
    session: requests.Session,
    candidate: Candidate,
    partial: Partial,
    patience: tuple[float, float],
    progress: Callable[[int], None],
    *,
    hurry: bool,
) -> None:
    import requests
    import urllib3

    # identity: a body that is compressed on the way would have other bytes than the ones that are pinned
    asked = {**candidate.headers, "Accept-Encoding": "identity"}
    if not partial.is_size_pinned:
        partial.size = None  # what another source told was its own word
    if partial.have:
        asked["Range"] = f"bytes={partial.have}-"
    try:
        with session.get(candidate.url, headers=asked, stream=True, timeout=patience) as response:
            if response.status_code == 416 and partial.size is None:  # what is stored is no beginning of its file
                partial.restart()
                raise _RefusedError("it has no such range", is_silence=True)
            if response.status_code >= 400:
                raise _refusal(response)
            _learn_size(partial, response)
            if partial.have and response.status_code != 206:
                if partial.size is not None and "Content-Length" not in response.headers:
                    raise _RefusedError("it ignores ranges and tells no length")
                partial.restart()  # it ignores ranges, and sends the whole of a file that has the right length
            partial.add(_blocks(response, hurry=hurry), candidate.source, progress)
    except bodies.SilenceError:
        raise _RefusedError("it fell silent", is_silence=True) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, bodies.BrokenError, ValueError) as error:
        raise _RefusedError(_silence(error), is_silence=True) from None
    if partial.size is not None and partial.have != partial.size:
        raise _RefusedError(f"it sent {partial.have:,} of {partial.size:,} bytes", is_silence=True)
    partial.size = partial.have


def _refusal(response: requests.Response) -> _RefusedError:
    """What an answer that is no file means for this source."""
    code = response.headers.get("X-Error-Code", "")
    said = " ".join(filter(None, [str(response.status_code), response.reason, code and f"({code})"]))
    if response.history and response.status_code in _NO_ACCESS:
        # The address that it sent us to has expired, most likely: it hands out a fresh one.
        return _RefusedError(f"where it leads to, the answer is {said}", is_silence=True)
    if response.status_code in _NO_ACCESS:
        return _RefusedError(f"it answers {said}", refusal=(response.status_code, code))
    wait = retry_after(response.headers.get("Retry-After")) if response.status_code in _BUSY else None
    if wait is not None and wait > LONGEST_WAIT_SECONDS:
        return _RefusedError(f"it answers {said}, and asks for {wait:,.0f} s of patience")
    return _RefusedError(f"it answers {said}", wait=wait)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _blocks(response: requests.Response, *, hurry: bool) -> Iterator[bytes | memoryview]:
    """What arrives, as it arrives."""
    since, arrived = time.monotonic(), 0
    for block in bodies.blocks(response.raw):
        yield block
        arrived += len(block)
        if time.monotonic() - since > _SLOWEST_SECONDS:
            if hurry and arrived < _SLOWEST_BYTES:
                raise _RefusedError(f"it sends {arrived / _SLOWEST_SECONDS / 1000:.0f} kB a second", is_silence=True)
            since, arrived = time.monotonic(), 0


def _learn_size(partial: Partial, response: requests.Response) -> None:
    """Compare the length that a source tells with what is pinned, or learn it."""
    whole = re.search(r"/(\d{1,18})$", response.headers.get("Content-Range", ""))
    told = whole.group(1) if whole else response.headers.get("Content-Length", "")
    if not re.fullmatch(r"[0-9]{1,18}", told) or (response.status_code == 206 and not whole):
        return
    if partial.size is None:
        partial.size = int(told)
    elif partial.size != int(told):
        raise _RefusedError(f"its file has {int(told):,} bytes, {partial.size:,} are right")


def _silence(error: Exception) -> str:
    """Why nothing came, in a few words."""
    import requests
    import urllib3

    if isinstance(error, requests.ConnectTimeout):
        return "it does not answer"
    if isinstance(
        error, urllib3.exceptions.ProtocolError | requests.exceptions.ChunkedEncodingError | bodies.BrokenError
    ):
        return "it broke off"
    if isinstance(error, requests.ReadTimeout) or "timed out" in str(error):
        return "it fell silent"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted"
    return f"it does not answer ({type(error).__name__})"


def retry_after(text: str | None, attempt: int = 0) -> float:
    """The seconds to wait before a busy server is asked again.

    Args:
        text: its Retry-After: seconds, or a date (source: RFC 9110, 10.2.3). Without one the wait doubles.
        attempt: how often it was asked again already.
    """
    wait = float(2**attempt)
    if text and text.strip().isdecimal():
        wait = float(text)
    elif text:
        with suppress(ValueError):
            wait = parsedate_to_datetime(text).timestamp() - time.time()
    return max(wait, 0.0)
