"""What one file holds: copied in the kernel where it can be, compared byte by byte, dressed like its original."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.fs import tree

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 1 << 20
BY_DESCRIPTOR = os.chmod in os.supports_fd and os.utime in os.supports_fd
_PIECE = 8 << 20  # between two looks at the keyboard
_FICLONE = 0x40049409  # linux/fs.h
_CANNOT_CLONE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF, errno.EPERM}
_NO_ATTRIBUTES = {errno.EOPNOTSUPP, errno.ENOSYS}
# The system's own labels belong to a place, not to a file.
_KEPT_ATTRIBUTES = ("user.", "system.posix_acl_", "security.capability")


def copy(
    source: int, target: int, found: os.stat_result, progress: Callable[[int], None], *, clone: bool = True
) -> bool:
    """Copy what an open file holds into an empty one; holes stay holes.

    Args:
        source: the open original.
        target: the open copy.
        found: the original's status.
        progress: told the bytes.
        clone: try to share blocks (btrfs, xfs).

    Returns:
        Whether to try to share blocks the next time.
    """
    if found.st_size <= BLOCK and not tree.is_sparse(found):
        _write(target, os.read(source, found.st_size))
        progress(found.st_size)
        return clone
    if clone and _cloned(source, target):
        progress(found.st_size)
        return True
    os.ftruncate(target, found.st_size)
    for start, end in tree.extents(source, found.st_size) if tree.is_sparse(found) else [(0, found.st_size)]:
        _copy_range(source, target, start, end, progress)
    return False


def _copy_range(source: int, target: int, start: int, end: int, progress: Callable[[int], None]) -> None:
    """Copy a range inside the kernel, or block by block where it will not."""
    os.lseek(target, start, os.SEEK_SET)
    os.lseek(source, start, os.SEEK_SET)
    inside = hasattr(os, "copy_file_range")
    while start < end:
        count = 0
        if inside:
            with contextlib.suppress(OSError):
                count = os.copy_file_range(source, target, min(_PIECE, end - start))
            inside = count > 0
        if count == 0:
            content = os.read(source, min(BLOCK, end - start))
            if not content:
                return  # it has been cut: the next look sees it
            count = len(content)
            _write(target, content)
        start += count
        progress(count)


def same(first: int, second: int, block: tuple[bytearray, bytearray], *, alone: bool = False) -> bool:
    """Whether two open files are equal in every byte, and (unless content `alone` counts) in mode and time.

    Holes count as zeros, and are not read where both have them.
    """
    one, other = os.fstat(first), os.fstat(second)
    if one.st_size != other.st_size:
        return False
    if not alone and (one.st_mtime_ns, one.st_mode) != (other.st_mtime_ns, other.st_mode):
        return False
    if one.st_size <= BLOCK:
        return os.read(first, one.st_size + 1) == os.read(second, one.st_size + 1)
    if not (tree.is_sparse(one) and tree.is_sparse(other)):
        return _same_range(first, second, 0, one.st_size, block)
    # What either file has data in is read in both.
    pieces = tree.extents(first, one.st_size) + tree.extents(second, one.st_size)
    return all(_same_range(first, second, start, end, block) for start, end in pieces)


def _same_range(first: int, second: int, start: int, end: int, block: tuple[bytearray, bytearray]) -> bool:
    one, other = block
    while start < end:
        count = _read_at(first, one, start)
        if count <= 0 or _read_at(second, other, start) != count:
            return False
        if count < len(one):
            return one[:count] == other[:count] and start + count >= end
        if one != other:
            return False
        start += count
    return True


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _read_at(descriptor: int, block: bytearray, start: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [block], start)
    os.lseek(descriptor, start, os.SEEK_SET)
    content = os.read(descriptor, len(block))
    block[: len(content)] = content
    return len(content)


def _cloned(source: int, target: int) -> bool:
    """Whether the file system let both files share their blocks (btrfs, xfs)."""
    try:
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
    except ImportError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT_CLONE:
            raise
        return False
    return True


def dress(target: int | str, source: int, found: os.stat_result, path: str) -> None:
    """Give a file or folder the owner, attributes, mode and times of its original, in the order that keeps them.

    Args:
        target: the open copy; its path where the system has no such acts on descriptors (BY_DESCRIPTOR).
        source: the open original.
        found: the original's status.
        path: the original's path, for messages.

    Raises:
        BlockedError: the other file system cannot hold one of them.
    """
    made = os.stat(target)  # noqa: PTH116 (it is a descriptor, or on Windows a path)
    if hasattr(os, "chown") and (made.st_uid, made.st_gid) != (found.st_uid, found.st_gid):
        try:
            os.chown(target, found.st_uid, found.st_gid)
        except PermissionError:
            # A group that we are not in is given up, as every copying tool does; an owner is not.
            if made.st_uid != found.st_uid:
                raise BlockedError(
                    f"{path} belongs to user {found.st_uid}, and a copy there would not. Leave it where it is, "
                    f"or change its owner: chown -R --no-dereference {made.st_uid} {path}"
                ) from None
    if hasattr(os, "listxattr") and isinstance(target, int):
        _attributes(target, source, path)
    os.chmod(target, stat.S_IMODE(found.st_mode))  # noqa: PTH101 (as above)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _attributes(target: int, source: int, path: str) -> None:
    try:
        names = os.listxattr(source)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        return
    for name in names:
        if not name.startswith(_KEPT_ATTRIBUTES):
            continue
        try:
            os.setxattr(target, name, os.getxattr(source, name))
        except OSError as error:
            raise BlockedError(
                f"{path} has the extended attribute {name}, which cannot be kept there ({error.strerror}). "
                f"If nobody needs it: setfattr -x {name} {path}"
            ) from None
