"""The exit codes of `bench`, and what a worker raises; the parent's errors are provision's."""

from __future__ import annotations

from enum import IntEnum

BUDGET = "the budget leaves"  # in why a case has no figure for want of time
PARTNER = "its partner could not be measured"  # why one of a pair has no figure
BYTES_FOR_A_RUN = 16 * 1024 * 1024  # what a run and its pictures take at most


class Exit(IntEnum):
    """What the exit code of `bench` means."""

    GOOD = 0
    FAILED = 1
    USAGE = 2
    VERDICT_FAIL = 3
    BLOCKED = 4
    NOT_JUDGED = 5
    INTERRUPTED = 130


# What torch's messages say where a device has no such kernel.
_UNSUPPORTED = (
    "not implemented",
    "not supported",
    "not_supported",
    "unable to find an engine",
    "only supported",
    "no execution plans",
    "no valid engine",
    "doesn't support",
)


class SkipError(Exception):
    """The case cannot run here, or cannot end in time; the message says why."""


def is_unsupported(error: Exception) -> bool:
    """Return whether torch says that a device has no such kernel; any other failure is no fact of the device."""
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(each in text for each in _UNSUPPORTED)
