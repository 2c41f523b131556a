"""Reads and sets refs/main of a repository in a hub cache: the commit that is loaded if a program names no revision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.fs import records
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_MOST_BYTES = 1 << 20
_LONGEST_NAME = 256
_MARK = "firstlight-main"  # a file in the repository's folder: the commits to which firstlight has set refs/main


def set_main(folder: Path, revision: str, pinned: Collection[str]) -> str | None:
    """Set refs/main to a commit, so that a program that names no revision loads this commit offline.

    refs/main is not changed if it names another present commit to which firstlight has not set it. It is not changed
    either if that commit is pinned, since otherwise two entries of the manifest would overwrite it in turn.

    Args:
        folder: the repository's folder in a hub cache.
        revision: the commit.
        pinned: the commits of this repository that the manifest pins.

    Returns:
        A note for the user if refs/main is not changed and names another commit; else None.
    """
    mark = folder / _MARK
    current, own = read_main(folder), read_text(mark).split()
    if current == revision:
        return None
    is_present = bool(current) and (folder / "snapshots" / current).is_dir()
    if is_present and (current not in own or current in pinned):
        return (
            f"refs/main is {current[:7]}, which is present too and is loaded by default. To load the pulled files, add "
            f"the argument revision={revision[:7]}…"
        )
    # The mark is written first and has both commits. After a kill between the two writes, either value of refs/main is
    # in the mark.
    write_atomic(mark, f"{current} {revision}" if is_present else revision)
    write_atomic(folder / "refs" / "main", revision)
    return None


def read_main(folder: Path) -> str:
    """Return the commit in a repository's refs/main; "" if the file does not exist, or its text is no folder's name."""
    name = read_text(folder / "refs" / "main")
    return name if name not in {".", ".."} and "/" not in name and len(name) < _LONGEST_NAME else ""


def read_text(path: Path) -> str:
    """Return the text of a small file without white space at its ends; "" if it cannot be read or is not UTF-8."""
    try:
        text = records.read_bytes(path, most_bytes=_MOST_BYTES).decode("utf-8").strip()
    except (OSError, ValueError):
        return ""
    return text if records.is_file_text(text) else ""
