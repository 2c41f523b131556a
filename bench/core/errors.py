"""Define the exit codes of `bench` and the errors of a worker.

The parent process raises those of `provision.core.errors`.
"""

from __future__ import annotations

from enum import IntEnum

BUDGET = "the budget leaves"  # a part of the reason of each case for which the time budget of the run was too short
PARTNER = "its partner could not be measured"  # the reason of a case of a pair whose other case failed
BYTES_FOR_A_RUN = 16 * 1024 * 1024  # no run writes files of more than this in total


class Exit(IntEnum):
    """Name the exit codes of `bench`.

    FAILED: a failure that no other code describes; the message gives the reason. USAGE: invalid arguments or an invalid
    file. VERDICT_FAIL: the verdict is "fail", or a case became slower than in the baseline. BLOCKED: the user must act
    first, for example free disk space. NOT_JUDGED: the verdict is "could not judge", or two runs cannot be compared.
    """

    GOOD = 0
    FAILED = 1
    USAGE = 2
    VERDICT_FAIL = 3
    BLOCKED = 4
    NOT_JUDGED = 5
    INTERRUPTED = 130


# Each of torch's messages about a missing kernel contains one of these phrases.
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
    """Signal that a case cannot run on this device, or cannot end within its time limit.

    The message gives the reason.
    """


def is_unsupported(error: Exception) -> bool:
    """Return whether an error means that the device has no kernel for the operation and dtype.

    False for any other failure.
    """
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(phrase in text for phrase in _UNSUPPORTED)
