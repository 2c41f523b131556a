"""Downloads the missing part of a file from one source, and classifies the failure if the source does not deliver."""

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
# A source that sends fewer bytes than this within so many seconds is replaced by another one that can be tried.
_SLOWEST_BYTES, _SLOWEST_SECONDS = 100_000, 5.0


@dataclass(frozen=True)
class Source:
    """Describe one server that can deliver a file.

    `source`: the name of the server in messages and records, such as "official" or a mirror's name.
    `url`: the URL of the file. `headers`: the request headers, such as a token.
    """

    source: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FetchOptions:
    """Hold the options of a request.

    `session`: the HTTP session.
    `progress`: called with the number of bytes in each received block.
    `timeouts`: (connect, read) in seconds.
    `has_alternative`: returns whether another source could be tried now; a slow source is kept if it returns False.
    """

    session: requests.Session
    progress: Progress
    timeouts: tuple[float, float]
    has_alternative: Callable[[], bool]


class SourceError(Exception):
    """Report that a source did not deliver a file, with the kind of failure.

    The message is a clause about the source, such as "it timed out"; the caller puts the source's name before it.
    `is_transient`: a timeout, a broken connection, a body that is too short, or a slow source; a retry may succeed.
    `is_wrong`: the source sent the whole file with wrong content.
    `wait`: the seconds after which the source, which is busy, is to be tried again; else None.
    `refusal`: (HTTP status, value of the header X-Error-Code) if the source denied access (401 or 403); else None.
    If none of these is set, the source cannot deliver this file, and a retry is of no use.
    """

    def __init__(
        self,
        reason: str,
        *,
        is_transient: bool = False,
        is_wrong: bool = False,
        wait: float | None = None,
        refusal: tuple[int, str] | None = None,
    ) -> None:
        """Store the message `reason`, and the kind of failure that the class describes."""
        super().__init__(reason)
        self.is_transient = is_transient
        self.is_wrong = is_wrong
        self.wait = wait
        self.refusal = refusal


class _Response(Enum):
    """Name the kinds of response.

    REST: the missing part that was requested (status 206). WHOLE: the whole file. NOTHING: the file has no bytes after
    those of the partial file (status 416).
    """

    REST = auto()
    WHOLE = auto()
    NOTHING = auto()


def append(options: FetchOptions, source: Source, partial: PartialFile) -> None:
    """Request the missing bytes of a partial file from a source, and append them to the partial file.

    The present bytes are kept, with one exception: the source sends a whole file with the pinned hash that begins with
    other bytes. Then the partial file is replaced by that file.

    If it returns without an error, the partial file may still be wrong. This is so only if the source sent exactly the
    missing bytes of a file with a pinned size: either the earlier bytes or the new ones are the cause.

    Raises:
        SourceError: the source does not deliver, or sends wrong content. Received bytes that may be correct are kept.
        OSError: the disk is full or cannot be written.
    """
    from_start = not partial.have
    while True:
        checkpoint = partial.checkpoint()
        try:
            kind = _receive(options, source, partial, from_start=from_start)
        except TooLargeError as error:
            partial.roll_back(checkpoint)
            limit = "half of the free space" if partial.size is None else "the pinned size"
            raise SourceError(f"it sends more than {error.most:,} bytes ({limit})") from None
        except ContentMismatchError as error:
            if error.mismatch is not None:
                raise _mismatch_error(partial, error) from None
            partial.restart()
            continue
        reason = partial.mismatch
        if reason is None or (kind is _Response.REST and partial.size is not None):
            return
        partial.roll_back(checkpoint)
        if kind is _Response.WHOLE:
            raise SourceError(f"it sent {reason}", is_wrong=True)
        from_start = True  # the whole file from this source shows whether the earlier bytes or the new ones are wrong


def _receive(options: FetchOptions, source: Source, partial: PartialFile, *, from_start: bool) -> _Response:
    """Request a file, or its missing bytes unless `from_start`, and append what the partial file lacks.

    Raises:
        SourceError, TooLargeError, ContentMismatchError: as these classes describe.
    """
    import requests
    import urllib3

    # "identity", since the hash of a compressed body is not the pinned one
    headers = {**source.headers, "Accept-Encoding": "identity"}
    if not from_start:
        headers["Range"] = f"bytes={partial.have}-"
    try:
        with options.session.get(source.url, headers=headers, stream=True, timeout=options.timeouts) as response:
            if response.status_code == 416 and partial.size is None and not from_start:
                return _Response.NOTHING
            if response.status_code >= 400:
                raise _status_error(response)
            kind = _Response.REST if response.status_code == 206 else _Response.WHOLE
            first = 0 if from_start else partial.have
            if kind is _Response.REST and not re.match(rf"bytes {first}-", response.headers.get("Content-Range", "")):
                raise SourceError("it sends another range of bytes than the requested one")
            size = _whole_size(response, partial)
            # A body of unknown length may be endless.
            most = partial.have + shutil.disk_usage(partial.path.parent).free // 2 if size is None else size
            blocks = _blocks(response, options)
            if kind is _Response.WHOLE and partial.have:
                blocks = partial.skip_present(blocks, options.progress, most)
            partial.add(blocks, source.source, options.progress, most)
    except body.StalledError:
        raise SourceError("it timed out", is_transient=True) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, body.ConnectionBrokenError, ValueError) as error:
        raise SourceError(_connection_failure(error), is_transient=True) from None
    if size is not None and partial.have != size:
        raise SourceError(f"it sent {partial.have:,} of {size:,} bytes", is_transient=True)
    return kind


def _mismatch_error(partial: PartialFile, error: ContentMismatchError) -> SourceError:
    """Return the error for a received whole file that has neither the partial file's bytes nor the pinned hash."""
    if error.size < partial.have:
        return SourceError("it sent fewer bytes than the partial file holds", is_transient=True)
    if partial.size not in {None, error.size}:
        return SourceError(f"it sent {error.size:,} of {partial.size:,} bytes", is_transient=True)
    return SourceError(f"it sent {error.mismatch}", is_wrong=True)


def _whole_size(response: requests.Response, partial: PartialFile) -> int | None:
    """Return the size of the whole file in bytes.

    It is the size in the response's headers (Content-Length or Content-Range), else the pinned size, else None.

    Raises:
        SourceError: the size in the headers is not the pinned size.
    """
    declared = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        declared = response.headers.get("Content-Range", "").rpartition("/")[2]
    if not re.fullmatch(r"[0-9]{1,18}", declared):
        return partial.size
    if partial.size not in {None, int(declared)}:
        raise SourceError(f"its file has {int(declared):,} bytes, but the pinned size is {partial.size:,} bytes")
    return int(declared)


def _blocks(response: requests.Response, options: FetchOptions) -> Iterator[Block]:
    """Yield the blocks of a response's body as they arrive.

    Raises:
        SourceError: the source sent less than 100 kB within 5 s, and another source could be tried now.
    """
    since, arrived = time.monotonic(), 0
    for block in body.blocks(response.raw, options.timeouts[1]):
        yield block
        arrived += len(block)
        if time.monotonic() - since > _SLOWEST_SECONDS:
            if arrived < _SLOWEST_BYTES and options.has_alternative():
                speed = arrived / _SLOWEST_SECONDS / 1000
                raise SourceError(f"it sends only {speed:.0f} kB a second", is_transient=True)
            since, arrived = time.monotonic(), 0


def _status_error(response: requests.Response) -> SourceError:
    """Return the error for a response with an HTTP error status (400 or more)."""
    code = response.headers.get("X-Error-Code", "")
    status = " ".join(filter(None, [str(response.status_code), response.reason, code and f"({code})"]))
    if response.history and response.status_code in _NO_ACCESS:
        # The URL of the redirect has most likely expired. The source redirects a new request to a new URL.
        return SourceError(f"its redirect target answers {status}", is_transient=True)
    if response.status_code in _NO_ACCESS:
        return SourceError(f"it answers {status}", refusal=(response.status_code, code))
    if response.status_code not in BUSY:
        return SourceError(f"it answers {status}")
    wait = retry_after(response.headers.get("Retry-After"))
    if wait > LONGEST_WAIT_SECONDS:
        return SourceError(f"it answers {status} with a Retry-After of {wait:,.0f} s, which is too long")
    return SourceError(f"it answers {status}", wait=wait)


def _connection_failure(error: Exception) -> str:
    """Return the cause of a failed connection as a clause about the source, such as "it timed out"."""
    import requests
    import urllib3

    if isinstance(error, requests.ConnectTimeout):
        return "it does not answer (no connection within the timeout)"
    if isinstance(
        error, urllib3.exceptions.ProtocolError | requests.exceptions.ChunkedEncodingError | body.ConnectionBrokenError
    ):
        return "the connection broke"
    if isinstance(error, requests.ReadTimeout) or "timed out" in str(error):
        return "it timed out"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted"
    return f"it does not answer ({type(error).__name__})"
