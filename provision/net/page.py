"""Reads the body of a page, such as an index page, with limits on its size and its time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from provision.core.errors import FirstlightError
from provision.net import body

if TYPE_CHECKING:
    import requests

MAX_PAGE_BYTES = 64 << 20  # after decompression; the largest pages of public indexes have a third of it
_BLOCK_BYTES = 1 << 16
# A page that arrives more slowly than this after so many seconds is abandoned.
_GRACE_SECONDS, _SLOWEST_BYTES_PER_SECOND = 20.0, 2_000


class PageError(FirstlightError):
    """Report that a page is too large or too slow; the text is the reason."""


def read_page(response: requests.Response, seconds: float) -> bytes:
    """Return the decompressed body of a response that was requested with `stream=True`.

    Args:
        response: the response.
        seconds: the timeout for the next data.

    Raises:
        PageError: the body is larger than MAX_PAGE_BYTES after decompression, or arrives too slowly.
        StalledError: no data arrived within `seconds`.
        urllib3.exceptions.HTTPError: the connection broke, or the compression is invalid.
    """
    content = bytearray()
    started = time.monotonic()
    raw = response.raw
    with body.StallTimeout(seconds, raw.shutdown) as watch:
        while block := raw.read1(_BLOCK_BYTES, decode_content=True):
            content += block
            if len(content) > MAX_PAGE_BYTES:
                raise PageError(f"its page is larger than {MAX_PAGE_BYTES >> 20} MiB")
            elapsed = time.monotonic() - started
            if elapsed > _GRACE_SECONDS and len(content) < elapsed * _SLOWEST_BYTES_PER_SECOND:
                raise PageError(f"its page arrives too slowly: {len(content)} bytes in {elapsed:.0f} s")
            watch.start()
    return bytes(content)
