"""Lists the HTTP status codes after which a request is repeated, and computes the wait before the retry."""

from __future__ import annotations

import time
from contextlib import suppress
from email.utils import parsedate_to_datetime

BUSY = {429, 500, 502, 503, 504}
# The longest wait for one retry: a server with a longer Retry-After counts as failed. A hub with a rate limit accepts
# requests again after five minutes.
LONGEST_WAIT_SECONDS = 600.0


def retry_after(text: str | None, attempt: int = 0) -> float:
    """Return the seconds to wait before a request to a busy server is repeated.

    Args:
        text: the value of the header Retry-After, seconds or a date (source: RFC 9110, 10.2.3); None without it.
        attempt: the number of retries so far. Without a valid `text` the wait is 2^attempt seconds.
    """
    wait = float(2**attempt)
    if text and text.strip().isdecimal():
        wait = float(text)
    elif text:
        with suppress(ValueError, OverflowError, OSError):  # not a date, or a year outside the range of timestamps
            wait = parsedate_to_datetime(text).timestamp() - time.time()
    return max(wait, 0.0)
