"""Asks one source for what is missing of a file, and says what its answer means where that does not come."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from provision.net import body
from provision.net.partial_file import ContentMismatchError, TooLargeError
from provision.net.retry import BUSY, LONGEST_WAIT_SECONDS, retry_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import requests

    from provision.net.partial_file import Block, PartialFile, Progress

_NO_ACCESS = {401, 403}
# A source that sends less than this over so long is left while there is another.
_SLOWEST_BYTES, _SLOWEST_SECONDS = 100_000, 5.0


@dataclass(frozen=True)
class Source:
    """One place that may deliver a file: whose it is, where, and what is sent along."""

    source: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FetchOptions:
    """How sources are asked.

    `patience`: (to connect, of silence) in seconds. `is_another`: whether somebody else could be asked now.
    """

    session: requests.Session
    progress: Progress
    patience: tuple[float, float]
    is_another: Callable[[], bool]


class SourceError(Exception):
    """One candidate did not deliver.

    It was silent, or is busy for `wait` seconds, or all that it sent `is_wrong`; else it does not have the file.
    `refusal`: (status, its code) where it shows the file to some users alone.
    """

    def __init__(
        self,
        reason: str,
        *,
        is_silence: bool = False,
        is_wrong: bool = False,
        wait: float | None = None,
        refusal: tuple[int, str] | None = None,
    ) -> None:
        """Take what the class says."""
        super().__init__(reason)
        self.is_silence = is_silence
        self.is_wrong = is_wrong
        self.wait = wait
        self.refusal = refusal


class _Response(Enum):
    """What a source has sent: the rest that it was asked for, the whole file, or nothing, as it has no such rest."""

    REST = auto()
    WHOLE = auto()
    NOTHING = auto()


def append(way: FetchOptions, candidate: Source, partial: PartialFile) -> None:
    """Ask a candidate for what is not here yet, and add it.

    What is here stays. It is forgotten only where the candidate sends the whole pinned file, and that begins otherwise.

    Raises:
        SourceError: it does not deliver, or all that it sends is wrong. What came stays where it may be right.
        OSError: the disk is full, or cannot be written.
    """
    from_its_start = not partial.have
    while True:
        mark = partial.mark()
        try:
            sent = _take(way, candidate, partial, from_its_start=from_its_start)
        except TooLargeError as error:
            partial.back_to(mark)
            which = "that may come" if partial.size is None else "that are right"
            raise SourceError(f"it sends more than the {error.most:,} bytes {which}") from None
        except ContentMismatchError as error:
            if error.wrong is not None:
                raise _otherwise(partial, error) from None
            partial.restart()
            continue
        reason = partial.wrong
        if reason is None or (sent is _Response.REST and partial.size is not None):
            return  # where every byte is here, and they are not right, nobody knows whose fault that is
        partial.back_to(mark)
        if sent is _Response.WHOLE:
            raise SourceError(f"it sent {reason}", is_wrong=True)
        from_its_start = True  # what it has as a whole tells which of the two is wrong


def _take(way: FetchOptions, candidate: Source, partial: PartialFile, *, from_its_start: bool) -> _Response:
    import requests
    import urllib3

    # identity: a body that is compressed on the way would have other bytes than the ones that are pinned
    asked = {**candidate.headers, "Accept-Encoding": "identity"}
    if not from_its_start:
        asked["Range"] = f"bytes={partial.have}-"
    try:
        with way.session.get(candidate.url, headers=asked, stream=True, timeout=way.patience) as response:
            if response.status_code == 416 and partial.size is None and not from_its_start:
                return _Response.NOTHING
            if response.status_code >= 400:
                raise _refusal(response)
            sent = _Response.REST if response.status_code == 206 else _Response.WHOLE
            first = 0 if from_its_start else partial.have
            if sent is _Response.REST and not re.match(rf"bytes {first}-", response.headers.get("Content-Range", "")):
                raise SourceError("it sends another range than it was asked for")
            size = _size(response, partial)
            # A body that tells no length may have no end.
            most = partial.have + shutil.disk_usage(partial.path.parent).free // 2 if size is None else size
            blocks = _blocks(response, way)
            if sent is _Response.WHOLE and partial.have:
                blocks = partial.rest_of(blocks, way.progress, most)
            partial.add(blocks, candidate.source, way.progress, most)
    except body.StalledError:
        raise SourceError("it fell silent", is_silence=True) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, body.ConnectionBrokenError, ValueError) as error:
        raise SourceError(_silence(error), is_silence=True) from None
    if size is not None and partial.have != size:
        raise SourceError(f"it sent {partial.have:,} of {size:,} bytes", is_silence=True)
    return sent


def _otherwise(partial: PartialFile, error: ContentMismatchError) -> SourceError:
    """What it means that a whole file arrived that begins otherwise than what is here, and is not the pinned one."""
    if error.size < partial.have:
        return SourceError("it sent less than is here already", is_silence=True)
    if partial.size not in {None, error.size}:
        return SourceError(f"it sent {error.size:,} of {partial.size:,} bytes", is_silence=True)
    return SourceError(f"it sent {error.wrong}", is_wrong=True)


def _size(response: requests.Response, partial: PartialFile) -> int | None:
    """The whole file's bytes: those that are pinned, else those that a source tells.

    Raises:
        SourceError: it tells other ones than are pinned.
    """
    told = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        told = response.headers.get("Content-Range", "").rpartition("/")[2]
    if not re.fullmatch(r"[0-9]{1,18}", told):
        return partial.size
    if partial.size not in {None, int(told)}:
        raise SourceError(f"its file has {int(told):,} bytes, {partial.size:,} are right")
    return int(told)


def _blocks(response: requests.Response, way: FetchOptions) -> Iterator[Block]:
    """What arrives, as it arrives."""
    since, arrived = time.monotonic(), 0
    for block in body.blocks(response.raw, way.patience[1]):
        yield block
        arrived += len(block)
        if time.monotonic() - since > _SLOWEST_SECONDS:
            if arrived < _SLOWEST_BYTES and way.is_another():
                raise SourceError(f"it sends {arrived / _SLOWEST_SECONDS / 1000:.0f} kB a second", is_silence=True)
            since, arrived = time.monotonic(), 0


def _refusal(response: requests.Response) -> SourceError:
    """What an answer that is no file means for this source."""
    code = response.headers.get("X-Error-Code", "")
    said = " ".join(filter(None, [str(response.status_code), response.reason, code and f"({code})"]))
    if response.history and response.status_code in _NO_ACCESS:
        # The address that it sent us to has expired, most likely: it hands out a fresh one.
        return SourceError(f"where it leads to, the answer is {said}", is_silence=True)
    if response.status_code in _NO_ACCESS:
        return SourceError(f"it answers {said}", refusal=(response.status_code, code))
    if response.status_code not in BUSY:
        return SourceError(f"it answers {said}")
    wait = retry_after(response.headers.get("Retry-After"))
    if wait > LONGEST_WAIT_SECONDS:
        return SourceError(f"it answers {said}, and asks for {wait:,.0f} s of patience")
    return SourceError(f"it answers {said}", wait=wait)


def _silence(error: Exception) -> str:
    """Why nothing came, in a few words."""
    import requests
    import urllib3

    if isinstance(error, requests.ConnectTimeout):
        return "it does not answer"
    if isinstance(
        error, urllib3.exceptions.ProtocolError | requests.exceptions.ChunkedEncodingError | body.ConnectionBrokenError
    ):
        return "it broke off"
    if isinstance(error, requests.ReadTimeout) or "timed out" in str(error):
        return "it fell silent"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted"
    return f"it does not answer ({type(error).__name__})"
