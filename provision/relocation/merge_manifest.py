"""Writes the list of the entries of a merge; undo reads this list to separate the two folders again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from provision.fs import durable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from provision.fs.merge_tree import MergeEntry


def write(folder: Path, entries: Iterable[MergeEntry]) -> Path:
    """Write the entries as JSON to a new file in the folder of backups, sync the file, and return its path."""
    durable.make_folders(folder)
    path = folder / f"merge-{sum(1 for _ in folder.iterdir())}.json"
    with path.open("x", encoding="ascii") as file:
        json.dump([entry.to_dict() for entry in entries], file)
        file.flush()
        durable.sync_descriptor(file.fileno())
    durable.sync_folder(folder)
    return path
