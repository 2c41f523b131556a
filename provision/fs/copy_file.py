"""Copies the content and metadata of one file, in the kernel if possible, and compares two files byte by byte."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.fs import tree
from provision.fs.kept_metadata import ALL_KEPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from provision.fs.kept_metadata import KeptMetadata

BLOCK = 1 << 20
BY_DESCRIPTOR = os.chmod in os.supports_fd and os.utime in os.supports_fd
_PIECE = 8 << 20  # bytes for each call of copy_file_range; Ctrl-C takes effect between two calls
_FICLONE = 0x40049409  # linux/fs.h
_CANNOT_CLONE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF, errno.EPERM}
_NO_ATTRIBUTES = {errno.EOPNOTSUPP, errno.ENOSYS}
# Other extended attributes, such as SELinux labels, depend on the folder in which a file lies.
_KEPT_ATTRIBUTES = ("user.", "system.posix_acl_", "security.capability")


def copy(
    source: int, target: int, status: os.stat_result, progress: Callable[[int], None], *, clone: bool = True
) -> bool:
    """Copy the content of an open file into an open, empty file; holes stay holes.

    Args:
        source: the descriptor of the original.
        target: the descriptor of the copy.
        status: the status of the original.
        progress: called after each copied piece with the number of its bytes.
        clone: try to make both files share their blocks (FICLONE; btrfs, xfs).

    Returns:
        True if the next file should be copied with `clone` too; False if the file system cannot share blocks.
    """
    if status.st_size <= BLOCK and not tree.is_sparse(status):
        _write(target, os.read(source, status.st_size))
        progress(status.st_size)
        return clone
    if clone and _cloned(source, target):
        progress(status.st_size)
        return True
    os.ftruncate(target, status.st_size)
    for start, end in tree.extents(source, status.st_size) if tree.is_sparse(status) else [(0, status.st_size)]:
        _copy_range(source, target, start, end, progress)
    return False


def _copy_range(source: int, target: int, start: int, end: int, progress: Callable[[int], None]) -> None:
    """Copy the bytes from `start` to `end` with copy_file_range, or with read and write if that call fails."""
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
                return  # the original has been truncated; the next round of the tree copy detects it
            count = len(content)
            _write(target, content)
        start += count
        progress(count)


def is_same(
    first: int,
    second: int,
    block: tuple[bytearray, bytearray],
    *,
    content_only: bool = False,
    kept: KeptMetadata = ALL_KEPT,
) -> bool:
    """Return whether two open files are equal in content and, unless `content_only`, in mode and modification time.

    A hole is equal to zero bytes. A range that is a hole in both files is not read.

    Args:
        first: the descriptor of the first file.
        second: the descriptor of the second file.
        block: two buffers of equal length into which the files are read.
        content_only: ignore mode and modification time.
        kept: the metadata that both file systems keep; only these are compared.
    """
    status, other = os.fstat(first), os.fstat(second)
    if status.st_size != other.st_size:
        return False
    if not content_only and not (
        kept.is_same_time(status.st_mtime_ns, other.st_mtime_ns) and (status.st_mode == other.st_mode or not kept.modes)
    ):
        return False
    if status.st_size <= BLOCK:
        return os.read(first, status.st_size + 1) == os.read(second, status.st_size + 1)
    if not (tree.is_sparse(status) and tree.is_sparse(other)):
        return _same_range(first, second, 0, status.st_size, block)
    # A range that has data in one of the files is read in both files.
    ranges = tree.extents(first, status.st_size) + tree.extents(second, status.st_size)
    return all(_same_range(first, second, start, end, block) for start, end in ranges)


def _same_range(first: int, second: int, start: int, end: int, block: tuple[bytearray, bytearray]) -> bool:
    buffer, other = block
    while start < end:
        count = _read_at(first, buffer, start)
        if count <= 0 or _read_at(second, other, start) != count:
            return False
        if count < len(buffer):
            return buffer[:count] == other[:count] and start + count >= end
        if buffer != other:
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
    """Make both files share their blocks (FICLONE), and return True; return False if the file system cannot do that."""
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


def copy_metadata(
    target: int | str, source: int, status: os.stat_result, path: str, kept: KeptMetadata = ALL_KEPT
) -> None:
    """Give a copy the owner, extended attributes, mode and times of its original, as far as `kept` names them.

    They are set in this order, because a change of the owner clears the set-user-ID bit and the file capabilities.

    Args:
        target: the descriptor of the copied file or folder; its path if BY_DESCRIPTOR is False.
        source: the descriptor of the original.
        status: the status of the original.
        path: the path of the original, for messages.
        kept: the metadata that both file systems keep.

    Raises:
        BlockedError: the owner or an extended attribute cannot be stored with the copy.
    """
    copy_status = os.stat(target)  # noqa: PTH116 (a descriptor, or on Windows a path)
    if kept.owners and hasattr(os, "chown"):
        _set_owner(target, copy_status, status, path, kept)
    if kept.attributes and hasattr(os, "listxattr") and isinstance(target, int):
        _attributes(target, source, path)
    _set_mode(target, copy_status, status, kept)
    try:
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    except OSError:
        if kept.mtime_ns != 0:
            raise


def _set_owner(
    target: int | str, copy_status: os.stat_result, status: os.stat_result, path: str, kept: KeptMetadata
) -> None:
    group = status.st_gid if kept.group else copy_status.st_gid
    if (copy_status.st_uid, copy_status.st_gid) == (status.st_uid, group):
        return
    try:
        os.chown(target, status.st_uid, group)
    except PermissionError:
        # A group of which this user is not a member is not kept, as in other copying tools. The owner must be kept.
        if copy_status.st_uid != status.st_uid:
            raise BlockedError(
                f"{path} belongs to user {status.st_uid}, and its copy cannot keep this owner. Do not relocate this "
                f"path, or change its owner: chown -R --no-dereference {copy_status.st_uid} {path}"
            ) from None


def _set_mode(target: int | str, copy_status: os.stat_result, status: os.stat_result, kept: KeptMetadata) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not kept.group and stat.S_ISDIR(status.st_mode):
        mode = mode & ~stat.S_ISGID | copy_status.st_mode & stat.S_ISGID
    if kept.modes:
        os.chmod(target, mode)  # noqa: PTH101 (a descriptor, or on Windows a path)
        return
    # One of the two file systems has fixed modes. A mode of 0777 there must not open a file of the home to other users.
    with contextlib.suppress(OSError):
        os.chmod(target, mode & stat.S_IRWXU)  # noqa: PTH101


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
                f"{path} has the extended attribute {name}, which the copy cannot store ({error.strerror}). "
                f"Remove the attribute if it is not needed: setfattr -x {name} {path}"
            ) from None
