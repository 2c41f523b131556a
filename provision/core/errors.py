"""Defines the exit codes of the commands, and the exceptions with which a command ends, each with its exit code."""

from __future__ import annotations

import errno
from enum import IntEnum


class Exit(IntEnum):
    """Name the exit codes of the commands; docs/commands.md gives the meaning of each."""

    GOOD = 0
    FAILED = 1
    USAGE = 2
    CHANGES = 3
    BLOCKED = 4
    PARTIAL = 5
    INTERRUPTED = 130


class FirstlightError(Exception):
    """Report a failure: the message names the thing, the fact and the next command.

    Args:
        message: the text for people.
        kind: a stable word for programs, such as "no-space"; default: the `kind` of the class. `command_end` lists all.
        next_act: the next command or action for the user; needed if the last sentence of the message does not name it.
    """

    exit = Exit.FAILED
    kind = "failed"

    def __init__(self, message: str = "", *, kind: str | None = None, next_act: str | None = None) -> None:
        """Store the message for people, and the kind and the next action for programs."""
        super().__init__(message)
        self.kind = kind or type(self).kind
        self.next_act = next_act


class SpecError(FirstlightError):
    """Report a wrong flag, or an error in a file that the user wrote."""

    exit = Exit.USAGE
    kind = "usage"


class BlockedError(FirstlightError):
    """Report an obstacle that the user must remove first.

    Examples are an absent volume, a full disk, a folder that firstlight did not make, and another active run.
    """

    exit = Exit.BLOCKED
    kind = "blocked"


class LostLockError(BlockedError):
    """Report that another run has taken over a lock of this run, so this run must change nothing more."""

    kind = "locked"


def from_os_error(error: OSError, *, needed_bytes: int | None = None, flag: str = "--root") -> FirstlightError:
    """Turn an OSError into one of firstlight's errors, whose message names a remedy.

    Args:
        error: the system's error; the message starts with its `filename`.
        needed_bytes: the size of the failed write in bytes, where it is known.
        flag: the command-line flag that selects another folder.
    """
    thing = error.filename or "a file"
    needed = f" ({needed_bytes:,} bytes are needed)" if needed_bytes is not None else ""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return BlockedError(
            f"{thing}: no space left{needed}. Free some space, or give another {flag}, then run again.", kind="no-space"
        )
    if error.errno == errno.EROFS:
        return BlockedError(
            f"{thing}: the file system is read-only{needed}. Remount it, or give another {flag}.", kind="read-only"
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return BlockedError(
            f"{thing}: permission denied{needed}. Change its owner or mode, or give another {flag}.", kind="permission"
        )
    if error.errno == errno.ENOTDIR:
        return BlockedError(
            f"{thing}: a file is in the place of a folder. Move this file away, or give another {flag}."
        )
    return FirstlightError(f"{thing}: {error.strerror or error}. Fix the cause, then run again.")
