"""Finds the mount on which a folder lies: mount point, file system type and options, from /proc/self/mountinfo."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    """Describe one mount: the mount point, the type of the file system, such as "ext4", and the sorted options."""

    point: str
    file_system: str
    options: tuple[str, ...]


def mount_of(folder: Path, mountinfo: Path = _MOUNTINFO) -> Mount | None:
    """Return the mount on which an existing folder lies; None on a system without mountinfo.

    The options are those of the mount point and of the file system (source: man 5 proc_pid_mountinfo).
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
    """Return a path from mountinfo with its octal escapes decoded.

    The kernel writes a space, tab, newline or backslash as a backslash and three octal digits.
    """
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match.group(1), 8)]), point)
