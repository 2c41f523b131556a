"""Tests the features of a folder's file system by using them, and lists the metadata that a copy on it can keep."""

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
_LEFTOVER_SECONDS = 3600  # a probe takes less than a second, so an older scratch folder comes from a killed run
# A time that is not a multiple of any unit below, not even of 2 s: the rounding of the stored time shows the unit.
_SET_MTIME_NS = 1_600_000_001_123_456_789
_UNITS_NS = (1, 100, 1000, 10**6, 10**9, 2 * 10**9)
_MODES = (0o640, 0o711)
_OTHER_USER = 12_345


@dataclass(frozen=True)
class Capabilities:
    """Hold the features of a file system for this user. None: not tested, or the operating system cannot test it.

    `execute`: programs on it can be started. `flock`: a lock by flock excludes a second one. `xattr`: extended
    attributes are kept. `chmod`: chmod raises no error. `modes`: a mode set by chmod is kept. `owners`: a new file
    belongs to this user, and if this user is root, a changed owner is kept. `case`: two names that differ by case only
    are two files. `exchange`: two names can be exchanged atomically. `fsync`: a file and the names in a folder can be
    forced to the disk. `mtime_ns` is the unit of kept modification times in nanoseconds; 0: a set time is not kept.
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
        """Return the metadata that a copy to or from this file system keeps; an unknown feature counts as kept."""
        return KeptMetadata(
            mtime_ns=1 if self.mtime_ns is None else self.mtime_ns,
            modes=self.modes is not False,
            owners=self.owners is not False,
            attributes=self.xattr is not False,
        )


UNTESTED = Capabilities(writable=True)


def probe(folder: Path) -> Capabilities:
    """Test each feature in a temporary folder inside `folder`, and return the features.

    The temporary folder is deleted afterwards.

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
    """Return the features that can be read without a write: the flag noexec of the mount, and the folder's permissions.

    The other features are None.

    Raises:
        OSError: the folder does not exist.
    """
    folder.stat()
    is_noexec = hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0))
    return Capabilities(os.access(folder, os.W_OK | os.X_OK), execute=False if is_noexec else None)


def free_space(folder: Path) -> tuple[int, int | None]:
    """Return (free bytes, free inodes) of a folder's file system for this user.

    The number of inodes is None if the file system allocates inodes on demand, or on Windows. A quota is counted only
    if it limits the size that the file system reports, as quotas of projects and containers do.
    """
    if not hasattr(os, "statvfs"):
        return shutil.disk_usage(folder).free, None
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize, system.f_favail if system.f_files else None


def existing(folder: Path) -> Path:
    """Return the path `folder`, or its nearest parent folder that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _works(test: Callable[[Path], bool], scratch: Path) -> bool:
    """Return the result of a test of one feature; False if a system call of the test fails."""
    try:
        return test(scratch)
    except (OSError, subprocess.SubprocessError):
        return False


def _execute(scratch: Path) -> bool:
    if sys.platform == "win32":
        return True
    program = scratch / "program"  # created with mode 0700, because chmod may have no effect
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
    """Return whether a held lock by flock blocks a second one.

    The library filelock is not used here, because it falls back to another kind of lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows locks ranges of bytes, which all its file systems support
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
    """Return the unit to which a set modification time is rounded, in nanoseconds; 0 if a set time is not kept."""
    try:
        os.utime(file, ns=(_SET_MTIME_NS, _SET_MTIME_NS))
        difference = abs(file.stat().st_mtime_ns - _SET_MTIME_NS)
    except OSError:
        return 0
    return next((unit for unit in _UNITS_NS if difference < unit), 0)


def _remove_leftovers(folder: Path) -> None:
    """Delete the temporary folders of probes that were killed more than an hour ago."""
    for leftover in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
