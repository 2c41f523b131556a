"""Names the commit of a repository that a program gets which names none: refs/main."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_MARK = "firstlight-main"  # beside refs: the revisions that we have named main


def name_main(folder: Path, revision: str, pinned: Collection[str]) -> str | None:
    """Let `main` name a revision: offline, a program that names none takes that.

    What somebody else has named stays, and so does a revision of ours that is pinned still: two entries of the manifest
    would name theirs in turn.

    Args:
        folder: the repository's in a hub cache.
        revision: the commit.
        pinned: every commit of this repository that the manifest pins.

    Returns:
        What its owner should know: `main` names another one that is here too.
    """
    mark = folder / _MARK
    named, ours = main(folder), _text(mark).split()
    if named == revision:
        return None
    is_here = bool(named) and (folder / "snapshots" / named).is_dir()
    if is_here and (named not in ours or named in pinned):
        return (
            f"refs/main names {named[:7]}, which is here too: what names no revision loads that; ours is "
            f"revision={revision[:7]}…"
        )
    # The mark first, with both: killed between the two, we know what is ours whichever it names.
    write_atomic(mark, f"{named} {revision}" if is_here else revision)
    write_atomic(folder / "refs" / "main", revision)
    return None


def main(folder: Path) -> str:
    """Return the commit that `main` of a repository names; empty where it names none."""
    return _text(folder / "refs" / "main")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
