"""Records changes of the user's files and folders in the journal: new folders, and backups of changed files."""

from __future__ import annotations

import hashlib
import stat
import uuid
from typing import TYPE_CHECKING

from provision.fs import durable
from provision.fs.atomic import write_atomic
from provision.volume.journal_acts import FileBackup, FileChange, FolderCreation

if TYPE_CHECKING:
    from pathlib import Path

    from provision.volume.journal import Journal


def make_folders(path: Path, journal: Journal) -> None:
    """Make a folder and its missing parent folders, and record each in the journal; undo removes the empty ones."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        journal.record(FolderCreation(folder))
        folder.mkdir(exist_ok=True)
        durable.sync_folder(folder.parent)


def keep_backup(path: Path, after: bytes | None, journal: Journal) -> None:
    """Back up the bytes and mode of a user's file that is about to change, and record the change in the journal.

    Args:
        path: the file; it may not exist yet.
        after: the content that the file will have; None: the file will be removed.
        journal: the journal of this run.
    """
    journal.record(FileBackup(path))
    backup = None
    mode = None
    if path.exists():
        backup = journal.backup / f"file-{uuid.uuid4().hex[:8]}"
        write_atomic(backup, path.read_bytes(), private=True)
        mode = stat.S_IMODE(path.stat().st_mode)
    digest = None if after is None else hashlib.sha256(after).hexdigest()
    journal.record(FileChange(path, backup, mode, digest))
