"""Changes the user's files and folders under the journal: backups, and folders that are made."""

from __future__ import annotations

import hashlib
import stat
import uuid
from typing import TYPE_CHECKING

from provision.fs.atomic import write_atomic
from provision.volume.journal_acts import FileBackup, FileChange, FolderCreation

if TYPE_CHECKING:
    from pathlib import Path

    from provision.volume.journal import Journal


def make_folders(path: Path, journal: Journal) -> None:
    """Make a folder and those above it; undo takes away what is empty then."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        journal.record(FolderCreation(folder))
        folder.mkdir(exist_ok=True)


def keep_backup(path: Path, after: bytes | None, journal: Journal) -> None:
    """Keep the bytes and mode of a file of the user's that is about to become `after` (None: to be taken away)."""
    journal.record(FileBackup(path))
    kept = None
    mode = None
    if path.exists():
        kept = journal.backup / f"file-{uuid.uuid4().hex[:8]}"
        write_atomic(kept, path.read_bytes(), private=True)
        mode = stat.S_IMODE(path.stat().st_mode)
    digest = None if after is None else hashlib.sha256(after).hexdigest()
    journal.record(FileChange(path, kept, mode, digest))
