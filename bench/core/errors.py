"""Define the exit codes of `bench` and the errors of a worker; the parent raises provision's errors."""

from __future__ import annotations

from enum import IntEnum

BUDGET = "the budget leaves"  # part of the reason of a case that had no time
PARTNER = "its partner could not be measured"  # the reason of a case whose pair failed
BYTES_FOR_A_RUN = 16 * 1024 * 1024  # upper bound for the files of one run


class Exit(IntEnum):
    """Name the exit codes of `bench`."""

    GOOD = 0
    FAILED = 1
    USAGE = 2
    VERDICT_FAIL = 3
    BLOCKED = 4
    NOT_JUDGED = 5
    INTERRUPTED = 130


# Words of torch's messages where a device has no such kernel.
_UNSUPPORTED = (
    "not implemented",
    "no available kernel",
    "not supported",
    "not_supported",
    "unable to find an engine",
    "only supported",
    "no execution plans",
    "no valid engine",
    "doesn't support",
)


class SkipError(Exception):
    """Signal that the case cannot run on this device or cannot end in time; the message gives the reason."""


def is_unsupported(error: Exception) -> bool:
    """Return whether torch reports that the device has no such kernel; other failures do not prove that."""
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(phrase in text for phrase in _UNSUPPORTED)
