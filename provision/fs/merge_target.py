"""Gives the entries of a merge their names in the target, to which another host may write at the same time."""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.fs.copy_tree import CANNOT_LINK

if TYPE_CHECKING:
    import os

    from provision.fs.open_dir import OpenDir

# The kernel or the file system does not know the flag of renameat2.
_NO_FLAG = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}

Mark = tuple[int, int, int, int]


def mark(status: os.stat_result | None) -> Mark | None:
    """Return the mark of an entry: (inode, size, modification time, change time); None if it does not exist."""
    return status and (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def place_new(stage: OpenDir, name: str, target: OpenDir, new: str) -> None:
    """Rename an entry of the stage to a name that the target does not have.

    Raises:
        BlockedError: the target has an entry of that name, which stays as it is.
    """
    try:
        try:
            stage.rename_exclusive(name, target, new)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NO_FLAG:
                raise
            if target.lstat(new) is not None:
                raise FileExistsError(errno.EEXIST, "", new) from None
            stage.rename(name, target, new)
    except FileExistsError:
        raise BlockedError(
            f"{target.path / new} was made during the merge, by another host or program. It stays as it is, and what "
            "is not merged yet is complete at its old path. Run again."
        ) from None


def move_aside(folder: OpenDir, name: str, other: str, *, link: bool) -> None:
    """Make a hard link `other` to an entry (`link`), or rename the entry to it, so that its name can be taken.

    A folder cannot take a name that a file still has, so its predecessor is renamed.
    """
    status = folder.lstat(name)
    if status is None:
        return
    kept = folder.lstat(other)
    if not link and kept is not None and (kept.st_dev, kept.st_ino) == (status.st_dev, status.st_ino):
        folder.unlink(name)  # a rename between two names of one file does nothing
        return
    if link and not stat.S_ISDIR(status.st_mode):
        try:
            if kept is None:
                folder.hardlink(name, folder, other)
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise
        else:
            return
    folder.rename(name, folder, other)
