"""What must be true before a folder is moved: nobody uses it, all of it is ours, and its new place can take it."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from provision.fs.open_dir import OpenDir
    from provision.fs.tree import TreeSize

HEADROOM = 1.1
_USES_SHOWN = 3


def users(folders: Sequence[Path], proc: Path = Path("/proc")) -> list[tuple[int, str, str]]:
    """The processes that work in these folders, as (pid, program, the path in use): files, mappings, working folder.

    Processes of others, which the system hides from us, are not seen. Our own files are left out, our own working
    folder is not.

    Args:
        folders: real paths.
        proc: where the kernel shows its processes.
    """
    if not (proc / "self").exists():
        return _users_by_psutil(folders)
    inside = tuple(os.fsencode(folder) for folder in folders)
    found = []
    for pid in sorted(int(name) for name in os.listdir(proc) if name.isdigit()):
        used = next(_used(proc / str(pid), inside, own=pid == os.getpid()), None)
        if used is not None:
            found.append((pid, _program(proc / str(pid)), os.fsdecode(used)))
    return found


def nobody_uses(folders: Sequence[Path]) -> None:
    """Nobody works in these folders.

    Raises:
        BlockedError: somebody does; with pid and path.
    """
    found = users(folders)
    if found:
        shown = "; ".join(f"pid {pid} ({program}) uses {path}" for pid, program, path in found[:_USES_SHOWN])
        more = f"; and {len(found) - _USES_SHOWN} more" if len(found) > _USES_SHOWN else ""
        raise BlockedError(f"{shown}{more}. End it, or leave that folder, then run again.")


def no_mount_inside(folder: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> None:
    """No other file system is mounted in the folder.

    Raises:
        BlockedError: one is.
    """
    try:
        lines = mountinfo.read_bytes().splitlines()
    except OSError:
        return
    inside = os.fsencode(folder) + b"/"
    for line in lines:
        # The kernel writes blanks, tabs, newlines and backslashes as octal numbers.
        point = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match.group(1), 8)]), line.split(b" ")[4])
        if point.startswith(inside):
            mount = os.fsdecode(point)
            raise BlockedError(f"{mount} is a mount inside {folder}. Unmount it, then run again: umount {mount}")


def safe_parent(parent: OpenDir) -> None:
    """Nobody else can put another thing in the place of what lies in this folder.

    Raises:
        BlockedError: everybody may rename in it.
    """
    if parent.descriptor is None:
        return
    mode = os.fstat(parent.descriptor).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise BlockedError(
            f"every user may rename what lies in {parent.path}, so nothing is moved there. Take that right away: "
            f"chmod o-w {parent.path}"
        )


def enough_room(amount: TreeSize, there: TreeSize, target: Path) -> None:
    """A file system takes the bytes and the inodes, and a tenth more.

    Args:
        amount: what is to be copied.
        there: what of it an earlier run has copied already.
        target: a folder of the file system.

    Raises:
        BlockedError: it does not; with both figures.
    """
    if not hasattr(os, "statvfs"):
        return
    free = os.statvfs(target)
    needed = {
        "bytes": (round(amount.bytes * HEADROOM) - there.bytes, free.f_bavail * free.f_frsize),
        # A file system that makes inodes as it goes says that it has none.
        "inodes": (round(amount.inodes * HEADROOM) - there.inodes, free.f_favail if free.f_files else None),
    }
    for what, (wanted, has) in needed.items():
        if has is not None and wanted > has:
            raise BlockedError(
                f"{target}: {has:,} {what} are free and {wanted:,} are needed. Free some, or give another --root, "
                "then run again."
            )


def movable(amount: TreeSize) -> None:
    """Every file belongs to us, or we are root and can keep its owner; and no other file system lies in between.

    Raises:
        BlockedError: one does not, or one does.
    """
    if amount.mount is not None:
        raise BlockedError(f"{amount.mount} is a mount of its own. Unmount it, then run again: umount {amount.mount}")
    if amount.foreign is not None:
        raise BlockedError(
            f"{amount.foreign} belongs to another user, and a copy of it would not. Look at it: "
            f"ls -ld {amount.foreign}; move it away, or change its owner."
        )


def _used(process: Path, inside: Sequence[bytes], *, own: bool) -> Iterator[bytes]:
    """The paths that one process uses; a process that ends meanwhile, or is not ours to see, uses none."""

    def within(path: bytes) -> bool:
        return any(path == folder or path.startswith(folder + b"/") for folder in inside)

    base = os.fsencode(process)
    names = [b"cwd"]
    if not own:
        names += [b"exe", b"root"]
        with contextlib.suppress(OSError):
            names += [b"fd/" + name for name in os.listdir(base + b"/fd")]
    for name in names:
        with contextlib.suppress(OSError):
            path = os.readlink(base + b"/" + name)
            if within(path):
                yield path
    if own:
        return
    with contextlib.suppress(OSError):
        maps = (process / "maps").read_bytes()
        if any(folder in maps for folder in inside):
            for line in maps.splitlines():
                path = line.partition(b"/")[2]
                if within(b"/" + path):
                    yield b"/" + path


def _program(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return os.fsdecode(b" ".join(words)).strip()[:60] or "?"


def _users_by_psutil(folders: Sequence[Path]) -> list[tuple[int, str, str]]:
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "name"]):
        with contextlib.suppress(psutil.Error, OSError):
            paths = [process.cwd(), process.exe()]
            if process.pid != os.getpid():
                paths += [each.path for each in process.open_files()]
            used = next((path for path in paths if any(Path(path).is_relative_to(each) for each in folders)), None)
            if used is not None:
                found.append((process.pid, process.info["name"], used))
    return found
