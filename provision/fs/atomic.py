"""Writes a file completely or not at all."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from provision.fs import durable

if TYPE_CHECKING:
    from pathlib import Path


def write_atomic(
    path: Path, content: str | bytes, *, like: os.stat_result | None = None, private: bool = False
) -> None:
    """Write a file so that a reader, or a crash, sees either the old bytes or all new ones.

    Args:
        path: the file; missing parent folders are made.
        content: the new content.
        like: the status of a file whose mode and owner the new file gets; default: those of any new file.
        private: make the file readable for this user only, from its creation on.
    """
    durable.make_folders(path.parent)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        is_narrow = private or like is not None
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600 if is_narrow else 0o666)) as file:
            file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
            file.flush()
            if like is not None:
                if hasattr(os, "chown") and like.st_uid != os.geteuid():
                    os.chown(part, like.st_uid, like.st_gid)
                part.chmod(stat.S_IMODE(like.st_mode))
            durable.sync_descriptor(file.fileno())  # the mode and the owner as well
        part.replace(path)
        durable.sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)
