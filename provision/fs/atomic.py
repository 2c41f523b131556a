"""Writes a file atomically: with its whole new content, or not at all."""

from __future__ import annotations

import os
import re
import secrets
import stat
from typing import TYPE_CHECKING

from provision.fs import durable

if TYPE_CHECKING:
    from pathlib import Path

PART = re.compile(r"\.part-[0-9]+(-[0-9a-f]{8})?$")  # the end of the name of a file that is not complete yet
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def write_atomic(
    path: Path, content: str | bytes, *, like: os.stat_result | None = None, private: bool = False
) -> None:
    """Write a file so that at every time, also after a crash, it has either the old content or the new one.

    Args:
        path: the file; missing parent folders are made.
        content: the new content; a text is written as UTF-8.
        like: the status of an existing file; the new file gets its mode and owner. Default: the mode by the umask, and
            this user.
        private: make the file readable for this user only, from its creation on.

    Raises:
        OSError: a system call failed; the error names the file, which has its old bytes.
    """
    durable.make_folders(path.parent)
    part, descriptor = _new_part(path, 0o600 if private or like is not None else 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
            file.flush()
            if like is not None:
                if hasattr(os, "chown") and like.st_uid != os.geteuid():
                    os.chown(part, like.st_uid, like.st_gid)
                part.chmod(stat.S_IMODE(like.st_mode))
            durable.sync_descriptor(file.fileno())  # after the changes of mode and owner, so that it covers them
        part.replace(path)
        durable.sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:  # a write to an open file, on a full disk
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def _new_part(path: Path, mode: int) -> tuple[Path, int]:
    """Make the file that becomes `path`, and return its path and a descriptor for writing.

    Its name cannot be predicted, and O_EXCL follows no link: no other user can prepare a link under it, and no
    process with the same id on another host writes the same file.
    """
    while True:
        part = path.with_name(f"{path.name}.part-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            return part, os.open(part, _NEW, mode)
        except FileExistsError:
            continue
