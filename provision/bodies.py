"""Reads the body of a response as it arrives, into one buffer: a byte is copied once on its way to the hash."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import urllib3

# Large enough that few calls are made, small enough to be still in a core's cache when it is hashed and written:
# of 2^17 … 2^20 this was the fastest, by a tenth against a fresh 2^20 for each read.
_BLOCK = 1 << 19


class SilenceError(Exception):
    """Nothing came for as long as was asked to wait."""


class BrokenError(Exception):
    """The line ended before the body did."""


def blocks(raw: urllib3.BaseHTTPResponse) -> Iterator[bytes | memoryview]:
    """What arrives, in pieces; one may not be kept when the next is asked for.

    The body must not be decoded on its way (ask for `Accept-Encoding: identity`).

    Raises:
        SilenceError: nothing came for the timeout of the request.
        BrokenError: the line ended.
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
                raise SilenceError from None
            except OSError:
                raise BrokenError from None
            if not count:
                raise BrokenError
            inner.length -= count
            raw.length_remaining = inner.length
            yield buffer[:count]
    while block := raw.read1(_BLOCK):
        yield block
