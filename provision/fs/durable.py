"""Forces files and the names in folders to the disk: the fsync of a file does not do that for the file's own name."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

# The file system does not know this request: some know it for no folder, some not at all.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EROFS}


def sync_descriptor(descriptor: int) -> None:
    """Force an open file or folder to the disk; do nothing on a file system that cannot do it.

    Raises:
        OSError: The disk failed (EIO, ENOSPC).
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


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
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Force what a file holds, its mode and its time to the disk.

    Raises:
        OSError: The disk failed (EIO, ENOSPC), or the file is not there.
    """
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))  # Windows forces files that can be written
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def new_file_mode() -> int:
    """Return the mode that a new file gets: 0666 without the bits of the umask."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return 0o666 & ~int(line.split()[1], 8)
    umask = os.umask(0o077)  # elsewhere the umask can only be read by setting it
    os.umask(umask)
    return 0o666 & ~umask


def make_private_folder(path: Path) -> None:
    """Make a folder that only this user can enter, and take the rights of others from one that is there.

    The missing folders above it are made as the umask allows.

    Raises:
        OSError: A folder cannot be made.
    """
    make_folders(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
        sync_folder(path.parent)
    status = path.stat()
    is_own = hasattr(os, "geteuid") and status.st_uid == os.geteuid()
    if is_own and stat.S_IMODE(status.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        with contextlib.suppress(OSError):  # a file system with fixed modes
            path.chmod(0o700)


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
