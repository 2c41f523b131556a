"""Finds files that a process writes which /proc does not show, such as one of another container."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError

if TYPE_CHECKING:
    from provision.fs.open_dir import OpenDir


def require_none(folder: OpenDir) -> None:
    """Check that no process of this kernel has a file of the folder open for writing.

    The kernel refuses a read lease for such a file (man 2 fcntl), also if the process is in another PID namespace. A
    file of another user, and one on a file system without leases, is not checked.

    Raises:
        BlockedError: a process has a file open for writing.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    if not hasattr(fcntl, "F_SETLEASE"):
        return
    for entry in folder.scan():
        if entry.is_dir(follow_symlinks=False):
            with folder.enter(entry.name) as inner:
                require_none(inner)
        elif entry.is_file(follow_symlinks=False) and _is_open_for_writing(folder, entry.name):
            raise BlockedError(
                f"{folder.path / entry.name} is open for writing. If no process of `fuser {folder.path / entry.name}` "
                "has it, look in the other containers that share it. End that process, then run again."
            )


def _is_open_for_writing(folder: OpenDir, name: str) -> bool:
    import fcntl

    with contextlib.suppress(OSError):  # deleted meanwhile, or not readable
        descriptor = folder.open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            # A process that opens the file during the lease causes a signal. This one is ignored by default.
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:
            return error.errno == errno.EAGAIN
        finally:
            os.close(descriptor)
    return False
