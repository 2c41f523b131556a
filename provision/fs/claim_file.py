"""Reads and creates the file of one claim of a lease."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from provision.fs import durable, records

if TYPE_CHECKING:
    from pathlib import Path

_MOST_BYTES = 1 << 16  # of the record in a claim
_READABLE = 0o644  # the mode of a claim, so that other users of a shared volume can read its record


def read(claim: Path) -> bytes:
    """Return the record in a claim; an entry that is not a small regular file has none, and expires."""
    try:
        return records.read_bytes(claim, most_bytes=_MOST_BYTES, follow_links=False)
    except ValueError:
        return b""


def create(path: Path, record: bytes) -> None:
    """Create a file that holds a record, and sync it.

    Raises:
        OSError: the file exists already, or cannot be written. An incomplete file is deleted.
    """
    file = path.open("xb")
    try:
        with file:
            file.write(record)
            file.flush()
            durable.sync_descriptor(file.fileno())
        with contextlib.suppress(OSError):  # some mounts have one fixed mode
            path.chmod(_READABLE)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
