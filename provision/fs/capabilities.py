"""Tests the features of a folder's file system by using them, and lists what a copy on it can keep."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.fs.kept_metadata import KeptMetadata
from provision.fs.open_dir import OpenDir

if TYPE_CHECKING:
    from collections.abc import Callable

_SCRATCH = ".firstlight-probe-"
_LEFTOVER_SECONDS = 3600  # a probe takes less than a second, so an older scratch folder is of a killed run
# A time whose digits differ in each unit, at an odd second: the distance of the stored time shows the unit.
_SET_MTIME_NS = 1_600_000_001_123_456_789
_UNITS_NS = (1, 100, 1000, 10**6, 10**9, 2 * 10**9)
_MODES = (0o640, 0o711)
_OTHER_USER = 12_345


@dataclass(frozen=True)
class Capabilities:
    """Hold the features of a file system for this user; None: not tested, or unknown on this system.

    `execute`: a program starts from it. `exchange`: two names can be exchanged atomically. `fsync`: a file and the
    names in a folder can be forced to the disk. `case`: names that differ by case only are two files. `chmod`: it
    raises no error. `modes`: it has its effect. `owners`: a new file belongs to this user, and for root a change of the
    owner is kept. `mtime_ns` is the unit in which modification times are kept; 0: a set time is not kept.
    """

    writable: bool
    execute: bool | None = None
    symlink: bool | None = None
    hardlink: bool | None = None
    flock: bool | None = None
    xattr: bool | None = None
    chmod: bool | None = None
    modes: bool | None = None
    owners: bool | None = None
    case: bool | None = None
    exchange: bool | None = None
    fsync: bool | None = None
    mtime_ns: int | None = None

    @property
    def kept(self) -> KeptMetadata:
        """Return the metadata that a copy on this file system, or from it, keeps; what is unknown counts as kept."""
        return KeptMetadata(
            mtime_ns=1 if self.mtime_ns is None else self.mtime_ns,
            modes=self.modes is not False,
            owners=self.owners is not False,
            attributes=self.xattr is not False,
        )


UNTESTED = Capabilities(writable=True)


def probe(folder: Path) -> Capabilities:
    """Test each feature in a temporary folder inside this one, which is deleted afterwards.

    Raises:
        OSError: the folder does not exist.
    """
    folder.stat()
    _remove_leftovers(folder)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
    except OSError:
        return Capabilities(writable=False)
    try:
        file = scratch / "file"
        try:
            file.write_text("content of a probe\n")
        except OSError:  # a full disk, or a quota
            return Capabilities(writable=False)
        return Capabilities(
            writable=True,
            execute=_works(_execute, scratch),
            symlink=_works(_symlink, scratch),
            hardlink=_works(_hardlink, scratch),
            flock=_works(_flock, scratch),
            xattr=_works(_xattr, scratch) if hasattr(os, "setxattr") else None,
            chmod=_works(_chmod, scratch) if sys.platform != "win32" else None,
            modes=_works(_modes, scratch) if sys.platform != "win32" else None,
            owners=_works(_owners, scratch) if hasattr(os, "chown") else None,
            case=_works(_case, scratch),
            exchange=_works(_exchange, scratch) if sys.platform != "win32" else None,
            fsync=_works(_fsync, scratch) if sys.platform != "win32" else None,
            mtime_ns=_mtime_unit(file),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def look(folder: Path) -> Capabilities:
    """Return the features that show without a write: the flags of the mount, and the permissions of an existing folder.

    Raises:
        OSError: the folder does not exist.
    """
    folder.stat()
    is_noexec = hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0))
    return Capabilities(os.access(folder, os.W_OK | os.X_OK), execute=False if is_noexec else None)


def free_space(folder: Path) -> tuple[int, int | None]:
    """Return the free bytes and the free inodes for this user; None where inodes are allocated on demand.

    A quota counts only where the file system reports it with its size, as those of projects and containers do.
    """
    if not hasattr(os, "statvfs"):
        return shutil.disk_usage(folder).free, None
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize, system.f_favail if system.f_files else None


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest folder above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _works(test: Callable[[Path], bool], scratch: Path) -> bool:
    """Return the result of a test; False where the file system refuses one of its calls."""
    try:
        return test(scratch)
    except (OSError, subprocess.SubprocessError):
        return False


def _execute(scratch: Path) -> bool:
    if sys.platform == "win32":
        return True
    program = scratch / "program"  # with its mode from the start, because chmod may have no effect
    with open(program, "w", opener=lambda path, flags: os.open(path, flags, 0o700), encoding="ascii") as file:
        file.write("#!/bin/sh\nexit 0\n")
    return subprocess.run([program], check=False, timeout=10).returncode == 0


def _symlink(scratch: Path) -> bool:
    (scratch / "link").symlink_to("file")
    return (scratch / "link").read_bytes() == (scratch / "file").read_bytes()


def _hardlink(scratch: Path) -> bool:
    os.link(scratch / "file", scratch / "second")
    second = scratch / "second"  # some FUSE mounts give each name another inode number
    return second.stat().st_nlink == 2 or second.samefile(scratch / "file")


def _flock(scratch: Path) -> bool:
    """Return whether a held lock blocks a second one. The library filelock would fall back to another kind of lock."""
    try:
        import fcntl
    except ImportError:  # Windows locks ranges of bytes, which every file system there has
        return True
    with (scratch / "lock").open("w") as first, (scratch / "lock").open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _xattr(scratch: Path) -> bool:
    os.setxattr(scratch / "file", "user.firstlight", b"kept")
    return os.getxattr(scratch / "file", "user.firstlight") == b"kept"


def _chmod(scratch: Path) -> bool:
    (scratch / "file").chmod(0o600)
    return True


def _modes(scratch: Path) -> bool:
    kept = []
    for mode in _MODES:
        (scratch / "file").chmod(mode)
        kept.append(stat.S_IMODE((scratch / "file").stat().st_mode))
    return tuple(kept) == _MODES


def _owners(scratch: Path) -> bool:
    file = scratch / "owned"
    file.touch()
    if file.stat().st_uid != os.geteuid():
        return False
    if os.geteuid() == 0:
        os.chown(file, _OTHER_USER, -1)
        return file.stat().st_uid == _OTHER_USER
    return True


def _case(scratch: Path) -> bool:
    (scratch / "Case").touch()
    return not (scratch / "cASE").exists()


def _exchange(scratch: Path) -> bool:
    (scratch / "one").touch()
    (scratch / "other").mkdir()
    with OpenDir.at(scratch) as folder:
        folder.exchange("one", folder, "other")
    return (scratch / "one").is_dir()


def _fsync(scratch: Path) -> bool:
    for path in (scratch / "file", scratch):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return True


def _mtime_unit(file: Path) -> int:
    """Return the unit in which a set modification time is kept, in nanoseconds; 0 if none is."""
    try:
        os.utime(file, ns=(_SET_MTIME_NS, _SET_MTIME_NS))
        difference = abs(file.stat().st_mtime_ns - _SET_MTIME_NS)
    except OSError:
        return 0
    return next((unit for unit in _UNITS_NS if difference < unit), 0)


def _remove_leftovers(folder: Path) -> None:
    """Delete the scratch folders that killed probes have left."""
    for leftover in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
