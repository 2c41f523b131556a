"""What lies in a folder: how much, what cannot be moved, and taking it away; no link is ever followed."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

    from provision.fs.open_dir import OpenDir

_BLOCK = 4096  # what the smallest file or folder takes on common file systems


@dataclass
class TreeSize:
    """What a tree needs elsewhere: bytes in whole blocks (a file with several names counts once), and inodes.

    `files` are the names that are no folder, and `data` their bytes: what a copy reports.
    `foreign` is the first entry that belongs to another user, `mount` the first other file system in it.
    """

    bytes: int = 0
    inodes: int = 0
    files: int = 0
    data: int = 0
    foreign: str | None = None
    mount: str | None = None

    def __iadd__(self, other: TreeSize) -> Self:
        self.bytes += other.bytes
        self.inodes += other.inodes
        self.files += other.files
        self.data += other.data
        return self


def measure(folder: OpenDir) -> TreeSize:
    """Count what lies in a folder; note the first entry of another owner, and the first other file system."""
    amount = TreeSize(inodes=1)
    here = os.lstat(folder.path) if folder.descriptor is None else os.fstat(folder.descriptor)
    _measure(folder, here.st_dev, amount, set())
    return amount


def is_empty(folder: OpenDir) -> bool:
    """Whether nothing but folders lies in it."""
    for entry in folder.scan():
        if not entry.is_dir(follow_symlinks=False):
            return False
        with folder.enter(entry.name) as below:
            if not is_empty(below):
                return False
    return True


def remove(folder: OpenDir, name: str) -> None:
    """Take away what is under a name, and all that lies in it; nothing there is no error."""
    found = folder.lstat(name)
    if found is None:
        return
    if not stat.S_ISDIR(found.st_mode) or folder.readlink(name) is not None:
        folder.unlink(name)
        return
    with folder.enter(name) as below:
        if below.descriptor is not None and found.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.fchmod(below.descriptor, 0o700)
        for entry in below.scan():
            remove(below, entry.name) if entry.is_dir(follow_symlinks=False) else below.unlink(entry.name)
    folder.rmdir(name)


def data_bytes(descriptor: int, found: os.stat_result) -> int:
    """The bytes of a file that are no hole."""
    if not is_sparse(found):
        return found.st_size
    return sum(end - start for start, end in extents(descriptor, found.st_size))


def is_sparse(found: os.stat_result) -> bool:
    """Whether fewer blocks are taken than the size needs: holes, or a file system that packs."""
    blocks: int = getattr(found, "st_blocks", 0)
    return hasattr(os, "SEEK_DATA") and blocks * 512 < found.st_size


def extents(descriptor: int, size: int) -> list[tuple[int, int]]:
    """The pieces of a file that hold data, as (start, end); the whole file where the system cannot say."""
    found = []
    place = 0
    while place < size:
        try:
            start = os.lseek(descriptor, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno == 6:  # ENXIO: nothing but a hole follows
                break
            return [(0, size)]
        place = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        if start < place:
            found.append((start, place))
    return found


def _measure(folder: OpenDir, device: int, amount: TreeSize, counted: set[int]) -> None:
    for entry in folder.scan():
        found = entry.stat(follow_symlinks=False)
        if hasattr(os, "geteuid") and os.geteuid() not in {0, found.st_uid}:
            amount.foreign = amount.foreign or str(folder.path / entry.name)
        amount.files += not stat.S_ISDIR(found.st_mode)
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            if found.st_ino in counted:
                continue
            counted.add(found.st_ino)
        amount.inodes += 1
        if stat.S_ISDIR(found.st_mode):
            if found.st_dev != device:
                amount.mount = amount.mount or str(folder.path / entry.name)
                continue
            with folder.enter(entry.name) as below:
                _measure(below, device, amount, counted)
        elif stat.S_ISREG(found.st_mode):
            size = _size(folder, entry.name, found)
            amount.data += size
            amount.bytes += -(-size // _BLOCK) * _BLOCK
    amount.bytes += _BLOCK


def _size(folder: OpenDir, name: str, found: os.stat_result) -> int:
    if not is_sparse(found):
        return found.st_size
    descriptor = folder.open(name, os.O_RDONLY)
    try:
        return data_bytes(descriptor, found)
    finally:
        os.close(descriptor)
