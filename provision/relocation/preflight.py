"""Checks before a folder move that no process uses the folder, that it can be moved, and that the target has space."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.fs.mount import unescaped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from provision.fs.capabilities import Capabilities
    from provision.fs.open_dir import OpenDir
    from provision.fs.tree import TreeSize

HEADROOM = 1.1  # free space that is required, as a multiple of the size of the tree
_USES_SHOWN = 3


def processes_using(folders: Sequence[Path], proc: Path = Path("/proc")) -> list[tuple[int, str, str]]:
    """Return (pid, program, used path) of each process with an open file, mapping or working folder in `folders`.

    Processes of other users are left out if the kernel hides them. For this process only the working folder is checked.

    Args:
        folders: real paths, without links.
        proc: the mount point of procfs.
    """
    if not (proc / "self").exists():
        return _processes_by_psutil(folders)
    inside = tuple(os.fsencode(folder) for folder in folders)
    processes = []
    for pid in sorted(int(name) for name in os.listdir(proc) if name.isdigit()):
        path = next(_used_paths(proc / str(pid), inside, is_own=pid == os.getpid()), None)
        if path is not None:
            processes.append((pid, _program(proc / str(pid)), os.fsdecode(path)))
    return processes


def require_unused(folders: Sequence[Path]) -> None:
    """Check that no process uses these folders.

    Raises:
        BlockedError: a process uses a folder; the message has its pid and the used path.
    """
    processes = processes_using(folders)
    if processes:
        shown = "; ".join(f"pid {pid} ({program}) uses {path}" for pid, program, path in processes[:_USES_SHOWN])
        more = f"; and {len(processes) - _USES_SHOWN} more" if len(processes) > _USES_SHOWN else ""
        raise BlockedError(f"{shown}{more}. End each process, or change its working folder, then run again.")


def require_no_mount(folder: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> None:
    """Check that no file system is mounted inside the folder.

    Raises:
        BlockedError: a file system is mounted inside the folder.
    """
    try:
        lines = mountinfo.read_bytes().splitlines()
    except OSError:
        return
    inside = os.fsencode(folder) + b"/"
    for line in lines:
        point = unescaped(line.split(b" ")[4])
        if point.startswith(inside):
            mount = os.fsdecode(point)
            raise BlockedError(f"{mount} is a mount inside {folder}. Unmount it, then run again: umount {mount}")


def require_safe_parent(parent: OpenDir) -> None:
    """Check that no other user can replace an entry of this folder.

    Raises:
        BlockedError: every user may rename entries of the folder: it is writable for all, and has no sticky bit.
    """
    if parent.descriptor is None:
        return
    mode = os.fstat(parent.descriptor).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise BlockedError(
            f"every user may rename files in {parent.path}, so a folder move there is not safe. Remove that right: "
            f"chmod o-w {parent.path}"
        )


@contextlib.contextmanager
def limited_depth() -> Iterator[None]:
    """Refuse folders that are nested deeper than this program can follow.

    Raises:
        BlockedError: they are.
    """
    try:
        yield
    except RecursionError:
        raise BlockedError(
            "folders are nested too deeply to be moved. The limit is several hundred levels. Leave this folder in the "
            "home (`relocate` in host.toml), or look for the deep one: find FOLDER -mindepth 400 -type d"
        ) from None


def existing_folder(path: Path) -> Path:
    """Return `path` if it exists, else its nearest parent folder that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def require_writable(folder: Path) -> None:
    """Check that this user can make entries in a folder; if it is missing, in its nearest parent folder that exists.

    Raises:
        BlockedError: the folder is not writable, or its file system is read-only.
    """
    nearest = existing_folder(folder)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BlockedError(f"{nearest} is not writable. Change its owner or mode, then run again: ls -ld {nearest}")


def is_one_mount(first: Path, second: Path) -> bool:
    """Return whether entries can be renamed from one existing folder to another: both are on the same mount."""
    if first.stat().st_dev != second.stat().st_dev:
        return False
    return _mount_id(first) == _mount_id(second)


def _mount_id(folder: Path) -> bytes | None:
    """Return the line with the mount id of a folder (man 5 proc_pid_fdinfo), such as b"mnt_id: 21"; else None."""
    if not hasattr(os, "O_PATH"):
        return None
    descriptor = os.open(folder, os.O_PATH)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_bytes().splitlines()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return next((line for line in lines if line.startswith(b"mnt_id:")), None)


def require_space(
    size: TreeSize,
    copied: TreeSize,
    target: Path,
    advice: str = "Free some space, or give another --root, then run again.",
) -> None:
    """Check that a file system has enough free bytes and inodes for a copy: those of the copy, plus a tenth.

    Args:
        size: the size of the tree to copy.
        copied: the size of the part that an interrupted run has copied already.
        target: a folder on the file system.
        advice: the last sentence of the message.

    Raises:
        BlockedError: bytes or inodes are short; the message has the needed and the free number.
    """
    if not hasattr(os, "statvfs"):
        return
    free = os.statvfs(target)
    requirements = {
        "bytes": (round(size.bytes * HEADROOM) - copied.bytes, free.f_bavail * free.f_frsize),
        # A file system that allocates inodes on demand reports a total of zero.
        "inodes": (round(size.inodes * HEADROOM) - copied.inodes, free.f_favail if free.f_files else None),
    }
    for unit, (needed, available) in requirements.items():
        if available is not None and needed > available:
            raise BlockedError(f"{target}: {available:,} {unit} are free and {needed:,} are needed. {advice}")


def require_movable(size: TreeSize, *, has_owners: bool = True) -> None:
    """Check that this user can give every entry of the copy its owner, and that no mount point lies in the tree.

    Args:
        size: the size of the tree.
        has_owners: False if the file system of the tree sets one owner for all files; owners are then not checked.

    Raises:
        BlockedError: an entry belongs to another user and this user is not root, or a file system is mounted in it.
    """
    if size.mount is not None:
        raise BlockedError(f"{size.mount} is a mount point. Unmount it, then run again: umount {size.mount}")
    if size.foreign is not None and has_owners:
        raise BlockedError(
            f"{size.foreign} belongs to another user, and a copy of it would belong to you. Look at the entry: "
            f"ls -ld {size.foreign}; move it away, or change its owner."
        )


def require_storable(size: TreeSize, target: Capabilities, folder: Path) -> None:
    """Check that a file system can store the names and links of a tree, before the first byte is copied.

    Args:
        size: the size of the tree.
        target: the features of the file system.
        folder: a folder on the file system, for the message.

    Raises:
        BlockedError: the tree has a symbolic link, or two names that differ by case only, and the file system cannot
            store these.
    """
    remedy = "Leave this folder in the home (`relocate` in host.toml), or give another --root."
    if target.symlink is False and size.link is not None:
        raise BlockedError(f"{size.link} is a symbolic link, and {folder} cannot store links. {remedy}")
    if target.case is False and size.case_pair is not None:
        first, second = size.case_pair
        raise BlockedError(f"{first} and {second} differ by case only, and {folder} takes them for one file. {remedy}")


def _used_paths(process: Path, inside: Sequence[bytes], *, is_own: bool) -> Iterator[bytes]:
    """Yield the paths below the folders `inside` that one process uses, as bytes.

    Args:
        process: the process's folder in /proc. If it has ended, or this user may not read it, nothing is yielded.
        inside: the real paths of the folders.
        is_own: it is the calling process, for which only the working folder is checked.
    """

    def is_inside(path: bytes) -> bool:
        return any(path == folder or path.startswith(folder + b"/") for folder in inside)

    base = os.fsencode(process)
    names = [b"cwd"]
    if not is_own:
        names += [b"exe", b"root"]
        with contextlib.suppress(OSError):
            names += [b"fd/" + name for name in os.listdir(base + b"/fd")]
    for name in names:
        with contextlib.suppress(OSError):
            path = os.readlink(base + b"/" + name)
            if is_inside(path):
                yield path
    if is_own:
        return
    with contextlib.suppress(OSError):
        maps = (process / "maps").read_bytes()
        if any(folder in maps for folder in inside):
            for line in maps.splitlines():
                path = line.partition(b"/")[2]
                if is_inside(b"/" + path):
                    yield b"/" + path


def _program(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return os.fsdecode(b" ".join(words)).strip()[:60] or "?"


def _processes_by_psutil(folders: Sequence[Path]) -> list[tuple[int, str, str]]:
    import psutil

    processes = []
    for process in psutil.process_iter(["pid", "name"]):
        with contextlib.suppress(psutil.Error, OSError):
            paths = [process.cwd(), process.exe()]
            if process.pid != os.getpid():
                paths += [file.path for file in process.open_files()]
            used = next((path for path in paths if any(Path(path).is_relative_to(folder) for folder in folders)), None)
            if used is not None:
                processes.append((process.pid, process.info["name"], used))
    return processes
