"""Forces files and the names in folders to the disk: the fsync of a file does not do that for the file's own name."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# The file system does not know this request for folders.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EROFS}


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the disk.

    Nothing is forced on Windows, in a folder that cannot be read, and on a file system that cannot do it.

    Raises:
        OSError: The disk failed (EIO, ENOSPC).
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Force what a file holds, its mode and its time to the disk.

    Raises:
        OSError: The disk failed (EIO, ENOSPC), or the file is not there.
    """
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))  # Windows forces files that can be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Make a folder and the missing ones above it, and force their names to the disk.

    Raises:
        OSError: A folder cannot be made.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was quicker
            folder.mkdir()
        sync_folder(folder.parent)
