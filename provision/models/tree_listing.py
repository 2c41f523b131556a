"""Reads the listings of huggingface_hub: the files of a commit, in the folder `trees` of a repository."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from provision.fs import records

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_LONGEST_NAME = 255  # bytes of one component of a path (source: NAME_MAX)
_LONGEST_PATH = 1000  # characters below the snapshot, which has a long path itself
_TREE_FORMAT = 1  # huggingface_hub's TREE_CACHE_FORMAT_VERSION
Listing = dict[str, tuple[str, int | None]]  # {path in the snapshot: (blob, size in bytes, None if unknown)}


def read(path: Path) -> Listing | None:
    """Return a listing that huggingface_hub has stored; None if it has another format or is not valid."""
    try:
        tree = records.table(records.parse(records.read_bytes(path), any_text=True))
        if tree["format_version"] != _TREE_FORMAT:
            return None
        rows = records.table(tree["files"])
    except (OSError, ValueError, KeyError):
        return None
    listing: Listing = {}
    for name, row in rows.items():
        with suppress(ValueError, KeyError):  # a row that describes no file
            info = records.table(row)
            blob, size = info.get("lfs_sha256") or info["blob_id"], info.get("lfs_size") or info["size"]
            if _is_inside(name):
                listing[name] = records.typed(blob, str), records.number(size)
    return without(listing, listing)


def listed_blobs(tree: Path) -> set[str]:
    """Return the names of the blobs in a listing of huggingface_hub; an empty set if it cannot be read."""
    return {blob for blob, _ in (read(tree) or {}).values()}


def without(listing: Listing, files: Collection[str]) -> Listing:
    """Return a listing without the paths that are a folder of one of the files, or lie below one of them."""
    folders = {str(folder) for name in files for folder in PurePosixPath(name).parents}
    return {
        name: row
        for name, row in listing.items()
        if name not in folders and not any(str(folder) in files for folder in PurePosixPath(name).parents)
    }


def _is_inside(path: str) -> bool:
    """Return whether a path in a listing is a file inside the snapshot: relative, without "." and ".."."""
    parts = path.split("/")
    is_plain = "." not in parts and ".." not in parts and all(parts) and len(path) <= _LONGEST_PATH
    return is_plain and records.is_file_text(path) and max(map(len, map(os.fsencode, parts))) <= _LONGEST_NAME
