"""The exit codes of `bench`; its errors are provision's, so that one place turns them into messages."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the exit code of `bench` means."""

    GOOD = 0
    FAILED = 1
    USAGE = 2
    VERDICT_FAIL = 3
    BLOCKED = 4
    NOT_JUDGED = 5
    INTERRUPTED = 130
