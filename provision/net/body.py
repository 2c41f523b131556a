"""Reads the body of a response as it arrives, into one buffer: a byte is copied once on its way to the hash."""

from __future__ import annotations

import http.client
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import urllib3
    from typing_extensions import Self

# Large enough that few calls are made, small enough to be still in a core's cache when it is hashed and written:
# of 2^17 … 2^20 this was the fastest, by a tenth against a fresh 2^20 for each read.
_BLOCK = 1 << 19


class StalledError(TimeoutError):
    """Nothing came for as long as was asked to wait."""


class ConnectionBrokenError(Exception):
    """The line ended before the body did."""


class StallTimeout:
    """Ends a reading that brings nothing for so many seconds: a socket's own limit starts anew with every byte.

    `end` is what ends it; `with` then raises StalledError.
    """

    def __init__(self, seconds: float, end: Callable[[], None]) -> None:
        """Take what the class says."""
        self._seconds = seconds
        self._end = end
        self._until: float | None = None
        self._changed = threading.Condition()
        self._is_over = self._has_ended = False

    def __enter__(self) -> Self:
        """Begin."""
        self.go_on()
        threading.Thread(target=self._wait, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let go; nothing is ended any more."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._has_ended:
            raise StalledError

    def go_on(self) -> None:
        """Something is waited for from now on."""
        with self._changed:
            self._until = time.monotonic() + self._seconds

    def rest(self) -> None:
        """Nothing is waited for: what came is at work."""
        with self._changed:
            self._until = None

    def _wait(self) -> None:
        with self._changed:
            while not self._is_over:
                left = self._seconds if self._until is None else self._until - time.monotonic()
                if left <= 0:
                    self._has_ended = True
                    with suppress(OSError, RuntimeError, ValueError):  # it has ended by itself
                        self._end()
                    return
                self._changed.wait(left)


def blocks(raw: urllib3.BaseHTTPResponse, seconds: float) -> Iterator[bytes | memoryview]:
    """What arrives, in pieces; one may not be kept when the next is asked for.

    The body must not be decoded on its way (ask for `Accept-Encoding: identity`).

    Args:
        raw: the response.
        seconds: how long it may bring nothing: a chunk's length, or what follows the last chunk, is nothing too.

    Raises:
        StalledError: nothing came for so long, or for the timeout of the request.
        ConnectionBrokenError: the line ended.
        urllib3.exceptions.HTTPError: as urllib3 says it.
    """
    # urllib3 hands out a new bytes for every read; what it reads from takes a buffer. It has no public name for it,
    # so whatever is not as expected is read through urllib3.
    inner = getattr(raw, "_fp", None)
    if isinstance(inner, http.client.HTTPResponse) and not inner.chunked and raw.length_remaining == inner.length:
        buffer = memoryview(bytearray(min(_BLOCK, inner.length or 0)))
        # The end is left to urllib3, which gives the connection back.
        while inner.length is not None and inner.length > len(buffer):
            try:
                count = inner.fp.readinto1(buffer)
            except TimeoutError:
                raise StalledError from None
            except OSError:
                raise ConnectionBrokenError from None
            if not count:
                raise ConnectionBrokenError
            inner.length -= count
            raw.length_remaining = inner.length
            yield buffer[:count]
    with StallTimeout(seconds, raw.shutdown) as watch:
        while block := raw.read1(_BLOCK):
            watch.rest()
            yield block
            watch.go_on()
