"""What says "not now" rather than "no", and how long it is waited for."""

from __future__ import annotations

import time
from contextlib import suppress
from email.utils import parsedate_to_datetime

BUSY = {429, 500, 502, 503, 504}
# A hub that counts requests lets one in again after five minutes; who asks for more than ten is not waited for.
LONGEST_WAIT_SECONDS = 600.0


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
        with suppress(ValueError, OverflowError, OSError):  # no date, or of a year that no clock has
            wait = parsedate_to_datetime(text).timestamp() - time.time()
    return max(wait, 0.0)
