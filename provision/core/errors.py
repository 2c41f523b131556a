"""The exit codes, and the errors that carry one."""

from __future__ import annotations

import errno
from enum import IntEnum


class Exit(IntEnum):
    """What a command's exit code means (docs: design of the commands)."""

    GOOD = 0
    FAILED = 1
    USAGE = 2
    CHANGES = 3
    BLOCKED = 4
    PARTIAL = 5
    INTERRUPTED = 130


class FirstlightError(Exception):
    """Something failed. The message names the thing, the fact and the next command.

    Args:
        message: for a person.
        kind: a stable word for programs (docs: `command_end`), where it is finer than the class's own.
        next_act: the command or act that comes next, where the message's last sentence does not say it.
    """

    exit = Exit.FAILED
    kind = "failed"

    def __init__(self, message: str = "", *, kind: str | None = None, next_act: str | None = None) -> None:
        """Take the message for people, and the kind and next act for programs."""
        super().__init__(message)
        self.kind = kind or type(self).kind
        self.next_act = next_act


class SpecError(FirstlightError):
    """A file or a flag that a person wrote is wrong."""

    exit = Exit.USAGE
    kind = "usage"


class BlockedError(FirstlightError):
    """A person must act first: volume absent, no space, a folder that is not ours, another run at work."""

    exit = Exit.BLOCKED
    kind = "blocked"


def from_os_error(error: OSError, *, needed_bytes: int | None = None, flag: str = "--root") -> FirstlightError:
    """Turn an OSError into the message that a person can act on.

    Args:
        error: what the system said; its `filename` is named in the message.
        needed_bytes: how much the write wanted, where that is known.
        flag: what names another place.
    """
    thing = error.filename or "a file"
    wanted = f" ({needed_bytes:,} bytes are needed)" if needed_bytes is not None else ""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return BlockedError(
            f"{thing}: no space left{wanted}. Free some, or give another {flag}, then run again.", kind="no-space"
        )
    if error.errno == errno.EROFS:
        return BlockedError(
            f"{thing}: the file system is read-only{wanted}. Remount it, or give another {flag}.", kind="read-only"
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return BlockedError(
            f"{thing}: permission denied{wanted}. Change its owner, or give another {flag}.", kind="permission"
        )
    if error.errno == errno.ENOTDIR:
        return BlockedError(f"{thing}: a file is in the place of a folder. Move it away, or give another {flag}.")
    return FirstlightError(f"{thing}: {error.strerror or error}. Mend that, then run again.")
