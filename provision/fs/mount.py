"""Finds the mount of a folder: its type, its options and its device, from /proc/self/mountinfo."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    """Describe one mount: its mount point, the type of its file system, and its options, sorted."""

    point: str
    file_system: str
    options: tuple[str, ...]


def mount_of(folder: Path, mountinfo: Path = _MOUNTINFO) -> Mount | None:
    """Return the mount that holds an existing folder; None where the system has no mountinfo.

    The options are those of the mount and of its file system (source: man 5 proc_pid_mountinfo).
    """
    try:
        lines = mountinfo.read_bytes().splitlines()
    except OSError:
        return None
    path = os.fsencode(folder.resolve())
    holder: Mount | None = None
    for line in lines:
        fields, _, system = line.partition(b" - ")
        words = fields.split(b" ")
        point = unescaped(words[4])
        is_inside = path == point or path.startswith(point.rstrip(b"/") + b"/")
        # A later line with the same mount point hides the earlier one.
        if is_inside and (holder is None or len(point) >= len(os.fsencode(holder.point))):
            file_system, _, super_options = system.split(b" ", 2)
            options = {*words[5].split(b","), *super_options.split(b",")}
            texts = tuple(sorted(os.fsdecode(option) for option in options))
            holder = Mount(os.fsdecode(point), os.fsdecode(file_system), texts)
    return holder


def unescaped(point: bytes) -> bytes:
    """Return a path of mountinfo, in which the kernel writes spaces, tabs, newlines and backslashes in octal."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match.group(1), 8)]), point)
