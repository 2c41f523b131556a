"""Tests the features of a folder's file system by using them."""

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
    """Hold the features of a folder's file system; those that need a write are None if the folder is read-only.

    `free_inodes` is None if the file system has no fixed number of inodes. `same_as_home`: the home folder lies on the
    same file system.
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
    """Test each feature in a temporary folder inside this one, which is deleted afterwards.

    Raises:
        OSError: the folder does not exist.
    """
    same = folder.stat().st_dev == home.stat().st_dev if home.exists() else False
    free_bytes, free_inodes = _free(folder)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".firstlight-probe-", dir=folder))
    except OSError:
        return Capabilities(False, None, None, None, None, free_bytes, free_inodes, same)
    try:
        (scratch / "file").write_text("#!/bin/sh\nexit 0\n")
        return Capabilities(
            True,
            _symlink(scratch),
            _hardlink(scratch),
            _execute(scratch),
            _flock(scratch),
            free_bytes,
            free_inodes,
            same,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _symlink(scratch: Path) -> bool:
    with contextlib.suppress(OSError):
        (scratch / "link").symlink_to("file")
        return (scratch / "link").read_bytes() == (scratch / "file").read_bytes()
    return False


def _hardlink(scratch: Path) -> bool:
    with contextlib.suppress(OSError):
        os.link(scratch / "file", scratch / "second")
        return (scratch / "second").stat().st_nlink == 2
    return False


def _execute(scratch: Path) -> bool:
    if sys.platform == "win32":
        return True
    with contextlib.suppress(OSError):
        (scratch / "file").chmod(0o700)
        return subprocess.run([scratch / "file"], check=False, timeout=10).returncode == 0
    return False


def _flock(scratch: Path) -> bool:
    """Return whether a held lock blocks a second one."""
    import filelock

    first, second = (filelock.FileLock(scratch / "lock", timeout=0, is_singleton=False) for _ in range(2))
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
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize, system.f_favail if system.f_files else None
