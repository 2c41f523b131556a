"""Builds trees with every kind of entry, and reads a tree into a value by which two trees can be compared."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
from pathlib import Path

from hypothesis import strategies as st

# File names of any bytes except the slash and NUL, which a name cannot contain.
NAMES = st.binary(min_size=1, max_size=60).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}
)


def fill(folder: Path) -> dict[str, object]:
    """Build a tree with unusual names, links, holes, modes and special files, and return `read(folder)`."""
    (folder / "blobs/deep/er").mkdir(parents=True)
    (folder / "empty/folder").mkdir(parents=True)
    (folder / "blobs/a").write_bytes(os.urandom(3_000_000))
    (folder / "blobs/b").write_bytes(b"")
    (folder / "blobs/deep/er/c.json").write_text("{}")
    (folder / "blobs/deep/c.json").write_text("{}")
    os.link(folder / "blobs/a", folder / "blobs/deep/same as a")
    (folder / "link").symlink_to("blobs/a")
    (folder / "dangling").symlink_to("/nowhere/at all")
    (folder / "to a folder").symlink_to("blobs")
    with (folder / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"in the middle")
    for name in (b"caf\xe9", "文件".encode(), b"new\nline", b"-rf", b" ", b"'\"$(x)`", b"\xff\xfe"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(name)
    (folder / "script").write_text("#!/bin/sh\n")
    (folder / "script").chmod(0o4755)
    (folder / "closed").mkdir()
    (folder / "closed/secret").write_text("s")
    (folder / "closed/secret").chmod(0o400)
    (folder / "closed").chmod(0o500)
    with contextlib.suppress(OSError):
        os.setxattr(folder / "blobs/b", "user.note", b"kept \xff")
    os.mkfifo(folder / "pipe")
    descriptor = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"/proc/self/fd/{descriptor}/socket")  # the full path may be too long for a socket
    os.close(descriptor)
    for number, path in enumerate(sorted(folder.rglob("*"), key=lambda item: -len(item.parts))):
        os.utime(path, ns=(10**18 + number, 10**18 + number * 1001), follow_symlinks=False)
    return read(folder)


def small(folder: Path) -> dict[str, object]:
    """Build a few files, links and folders, for tests that move hundreds of trees, and return `read(folder)`."""
    (folder / "blobs/deep").mkdir(parents=True)
    (folder / "blobs/a").write_bytes(os.urandom(2_500_000))
    (folder / "blobs/b").write_bytes(os.urandom(300))
    os.link(folder / "blobs/b", folder / "blobs/deep/b too")
    (folder / "blobs/deep/c").write_text("c")
    (folder / "link").symlink_to("blobs/a")
    return read(folder)


def read(folder: Path) -> dict[str, object]:
    """Return {relative path: (kind, mode, owner, content, time, attributes, first hard link)} of a tree.

    The content is the SHA-256 of a file or the target of a link. The time is in nanoseconds, and None for a folder.
    The last value is the first path of the same inode, or None for an entry with one name.
    """
    first: dict[int, str] = {}
    entries: dict[str, object] = {}
    for path in sorted(folder.rglob("*"), key=os.fsencode):
        name = str(path.relative_to(folder))
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = None
        if kind == stat.S_IFREG:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif kind == stat.S_IFLNK:
            content = str(path.readlink())
        names = os.listxattr(path, follow_symlinks=False) if kind != stat.S_IFLNK else []
        attributes = {key: os.getxattr(path, key) for key in names if key.startswith("user.")}
        link = first.setdefault(status.st_ino, name) if status.st_nlink > 1 and kind != stat.S_IFDIR else None
        # A move creates entries in folders, which changes the times of the folders.
        mtime = None if kind == stat.S_IFDIR else status.st_mtime_ns
        entries[name] = (kind, stat.S_IMODE(status.st_mode), status.st_uid, content, mtime, attributes, link)
    return entries


def contents(folder: Path) -> dict[str, object]:
    """Return {relative path: SHA-256 of a file, or target of a link} of a tree."""
    return {
        name: entry[3]
        for name, entry in read(folder).items()
        if isinstance(entry, tuple) and entry[0] in {stat.S_IFREG, stat.S_IFLNK}
    }
