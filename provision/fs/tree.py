"""Measures and deletes folders with all their entries; no link is followed."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

    from provision.fs.open_dir import OpenDir

BLOCK = 4096  # the bytes that the smallest file or folder occupies on common file systems


@dataclass
class TreeSize:
    """Hold the space that a copy of a folder tree needs: `bytes`, in whole blocks, and `inodes`.

    A file with several hard links counts once in `bytes`, `inodes` and `data`. `files` is the number of names that are
    not folders, and `data` the number of bytes in regular files without holes; the progress of a copy counts these.
    `foreign` is the path of the first entry that belongs to another user, `mount` the first mount point in the tree,
    and `link` the first symbolic link. `case_pair` is (path, name) of the first two entries of one folder whose names
    differ by case only.
    """

    bytes: int = 0
    inodes: int = 0
    files: int = 0
    data: int = 0
    foreign: str | None = None
    mount: str | None = None
    link: str | None = None
    case_pair: tuple[str, str] | None = None

    def __iadd__(self, other: TreeSize) -> Self:
        self.bytes += other.bytes
        self.inodes += other.inodes
        self.files += other.files
        self.data += other.data
        return self


def measure(folder: OpenDir) -> TreeSize:
    """Return the size of a folder tree, with the first entry of each kind that TreeSize names."""
    amount = TreeSize(inodes=1)
    status = os.lstat(folder.path) if folder.descriptor is None else os.fstat(folder.descriptor)
    _measure(folder, status.st_dev, amount, set())
    return amount


def is_empty(folder: OpenDir) -> bool:
    """Return whether a folder tree contains no file and no link: only folders, or nothing."""
    for entry in folder.scan():
        if not entry.is_dir(follow_symlinks=False):
            return False
        with folder.enter(entry.name) as inner:
            if not is_empty(inner):
                return False
    return True


def remove(folder: OpenDir, name: str) -> None:
    """Delete an entry of an open folder, and everything in it if it is a folder. A missing entry is no error."""
    status = folder.lstat(name)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode) or folder.readlink(name) is not None:
        folder.unlink(name)
        return
    with folder.enter(name) as inner:
        if inner.descriptor is not None and status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            with contextlib.suppress(PermissionError):  # a file system with fixed modes may still let us delete
                os.fchmod(inner.descriptor, 0o700)
        for entry in inner.scan():
            remove(inner, entry.name) if entry.is_dir(follow_symlinks=False) else inner.unlink(entry.name)
    folder.rmdir(name)


def remove_empty(folder: OpenDir, name: str) -> None:
    """Delete the subfolder `name` of an open folder, a tree that contains only folders. A missing one is no error.

    Raises:
        OSError: a file has appeared in the tree.
    """
    if folder.lstat(name) is None:
        return
    with folder.enter(name) as below:
        for entry in below.scan():
            remove_empty(below, entry.name)
    folder.rmdir(name)


def data_bytes(descriptor: int, status: os.stat_result) -> int:
    """Return the number of bytes of an open file that lie outside of its holes."""
    if not is_sparse(status):
        return status.st_size
    return sum(end - start for start, end in extents(descriptor, status.st_size))


def is_sparse(status: os.stat_result) -> bool:
    """Return whether a file occupies fewer blocks than its size needs, because of holes or of compression."""
    blocks: int = getattr(status, "st_blocks", 0)
    return hasattr(os, "SEEK_DATA") and blocks * 512 < status.st_size


def extents(descriptor: int, size: int) -> list[tuple[int, int]]:
    """Return the data ranges of an open file as a list of (start, end) offsets in bytes.

    If the file system does not report holes, the list has one range: the whole file.
    """
    ranges = []
    offset = 0
    while offset < size:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == 6:  # ENXIO: the rest of the file is a hole
                break
            return [(0, size)]
        offset = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        if start < offset:
            ranges.append((start, offset))
    return ranges


def _measure(folder: OpenDir, device: int, amount: TreeSize, counted: set[int]) -> None:
    names: dict[str, str] = {}
    for entry in folder.scan():
        status = entry.stat(follow_symlinks=False)
        other = names.setdefault(entry.name.casefold(), entry.name)
        if other != entry.name:
            amount.case_pair = amount.case_pair or (str(folder.path / other), entry.name)
        if stat.S_ISLNK(status.st_mode):
            amount.link = amount.link or str(folder.path / entry.name)
        if hasattr(os, "geteuid") and os.geteuid() not in {0, status.st_uid}:
            amount.foreign = amount.foreign or str(folder.path / entry.name)
        amount.files += not stat.S_ISDIR(status.st_mode)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if status.st_ino in counted:
                continue
            counted.add(status.st_ino)
        amount.inodes += 1
        if stat.S_ISDIR(status.st_mode):
            if status.st_dev != device:
                amount.mount = amount.mount or str(folder.path / entry.name)
                continue
            with folder.enter(entry.name) as inner:
                _measure(inner, device, amount, counted)
        elif stat.S_ISREG(status.st_mode):
            size = _size(folder, entry.name, status)
            amount.data += size
            amount.bytes += -(-size // BLOCK) * BLOCK
    amount.bytes += BLOCK


def _size(folder: OpenDir, name: str, status: os.stat_result) -> int:
    if not is_sparse(status):
        return status.st_size
    descriptor = folder.open(name, os.O_RDONLY)
    try:
        return data_bytes(descriptor, status)
    finally:
        os.close(descriptor)
