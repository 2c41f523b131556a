"""Defines the HTTP status codes that call for a retry, and computes the time until it."""

from __future__ import annotations

import time
from contextlib import suppress
from email.utils import parsedate_to_datetime

BUSY = {429, 500, 502, 503, 504}
# A hub with a rate limit accepts requests again after five minutes. A Retry-After above this limit is not waited for.
LONGEST_WAIT_SECONDS = 600.0


def retry_after(text: str | None, attempt: int = 0) -> float:
    """Return the seconds to wait before a request to a busy server is repeated.

    Args:
        text: the Retry-After header: seconds or a date (source: RFC 9110, 10.2.3). Without it the wait is 2^attempt.
        attempt: the number of retries so far.
    """
    wait = float(2**attempt)
    if text and text.strip().isdecimal():
        wait = float(text)
    elif text:
        with suppress(ValueError, OverflowError, OSError):  # not a date, or a year outside the range of timestamps
            wait = parsedate_to_datetime(text).timestamp() - time.time()
    return max(wait, 0.0)
