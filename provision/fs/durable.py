"""Forces files and the names in folders to the disk; a file's own name needs an fsync of its folder."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

# Errors of a file system that does not support fsync, or does not support it for folders.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EROFS}


def sync_descriptor(descriptor: int) -> None:
    """Force an open file or folder to the disk; do nothing on a file system that does not support fsync.

    Raises:
        OSError: the disk failed (EIO, ENOSPC).
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync_folder(path: Path) -> None:
    """Force the names of the entries of a folder to the disk.

    The function does nothing on Windows, for a folder that cannot be read, and on a file system that does not support
    fsync.

    Raises:
        OSError: the disk failed (EIO, ENOSPC).
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
    """Force the content, the mode and the modification time of a file to the disk.

    Raises:
        OSError: the disk failed (EIO, ENOSPC), or the file does not exist.
    """
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))  # Windows only forces files opened for writing
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def new_file_mode() -> int:
    """Return the mode of a new file of this process: 0666 without the bits of the umask."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return 0o666 & ~int(line.split()[1], 8)
    umask = os.umask(0o077)  # on other systems than Linux the umask can only be read by setting it
    os.umask(umask)
    return 0o666 & ~umask


def make_private_folder(path: Path) -> None:
    """Make a folder with the mode 0700. If this user's folder exists with rights for others, set its mode to 0700.

    Missing parent folders are made with the mode that the umask allows.

    Raises:
        OSError: a folder cannot be made.
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
    """Make a folder and its missing parent folders, and force their names to the disk.

    Raises:
        OSError: a folder cannot be made.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process has just made the folder
            folder.mkdir()
        sync_folder(folder.parent)
