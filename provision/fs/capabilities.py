"""What a folder's file system can do, found out by doing it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Capabilities:
    """What was tried in a folder; None where it cannot be written, so nothing could be tried.

    `free_inodes` is None where the file system makes them as it goes; `same_as_home`: whether the home lies on it.
    """

    writable: bool
    symlink: bool | None
    hardlink: bool | None
    execute: bool | None
    flock: bool | None
    free_bytes: int
    free_inodes: int | None
    same_as_home: bool


def probe(folder: Path, home: Path) -> Capabilities:
    """Try each thing in a folder of our own inside this one, and take it away again.

    Raises:
        OSError: the folder is not there.
    """
    same = folder.stat().st_dev == home.stat().st_dev if home.exists() else False
    free_bytes, free_inodes = _free(folder)
    try:
        own = Path(tempfile.mkdtemp(prefix=".firstlight-probe-", dir=folder))
    except OSError:
        return Capabilities(False, None, None, None, None, free_bytes, free_inodes, same)
    try:
        (own / "file").write_text("#!/bin/sh\nexit 0\n")
        return Capabilities(
            True, _symlink(own), _hardlink(own), _execute(own), _flock(own), free_bytes, free_inodes, same
        )
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _symlink(own: Path) -> bool:
    with contextlib.suppress(OSError):
        (own / "link").symlink_to("file")
        return (own / "link").read_bytes() == (own / "file").read_bytes()
    return False


def _hardlink(own: Path) -> bool:
    with contextlib.suppress(OSError):
        os.link(own / "file", own / "second")
        return (own / "second").stat().st_nlink == 2
    return False


def _execute(own: Path) -> bool:
    if sys.platform == "win32":
        return True
    with contextlib.suppress(OSError):
        (own / "file").chmod(0o700)
        return subprocess.run([own / "file"], check=False, timeout=10).returncode == 0
    return False


def _flock(own: Path) -> bool:
    """Whether a lock that one holds keeps another out."""
    import filelock

    first, second = (filelock.FileLock(own / "lock", timeout=0, is_singleton=False) for _ in range(2))
    try:
        with first:
            try:
                with second:
                    return False
            except filelock.Timeout:
                return True
    except (OSError, NotImplementedError):
        return False


def _free(folder: Path) -> tuple[int, int | None]:
    if not hasattr(os, "statvfs"):
        return shutil.disk_usage(folder).free, None
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
