"""Reads and sets refs/main of a repository in a hub cache: the commit that is loaded by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_MARK = "firstlight-main"  # a file in the repository's folder: the revisions to which firstlight has set main


def set_main(folder: Path, revision: str, pinned: Collection[str]) -> str | None:
    """Set refs/main to a revision, so that a program that names no revision loads it offline.

    A main that firstlight has not set stays. One that firstlight has set to another pinned revision stays as well,
    since otherwise two entries of the manifest would overwrite each other's main.

    Args:
        folder: the repository's folder in a hub cache.
        revision: the commit.
        pinned: the commits of this repository that the manifest pins.

    Returns:
        A note for the user if main stays at another commit that is present; else None.
    """
    mark = folder / _MARK
    current, own = read_main(folder), read_text(mark).split()
    if current == revision:
        return None
    is_present = bool(current) and (folder / "snapshots" / current).is_dir()
    if is_present and (current not in own or current in pinned):
        return (
            f"refs/main is {current[:7]}, which is present too and is loaded by default. To load the pulled files: "
            f"revision={revision[:7]}…"
        )
    # The mark is written first and has both: after a kill in between, either value of main is in the mark.
    write_atomic(mark, f"{current} {revision}" if is_present else revision)
    write_atomic(folder / "refs" / "main", revision)
    return None


def read_main(folder: Path) -> str:
    """Return the commit of a repository's refs/main; empty if the file does not exist."""
    return read_text(folder / "refs" / "main")


def read_text(path: Path) -> str:
    """Return the text of a small file without outer white space; empty if it does not exist or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
