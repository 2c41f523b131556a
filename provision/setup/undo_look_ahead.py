"""Checks before an undo that its steps can all succeed: the volume's records, users of the folders, and free space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.core.step import Check, State
from provision.fs import tree
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import preflight
from provision.relocation.undo_move import kept_for
from provision.volume import links
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.relocation.undo_merge import UndoMergeStep
    from provision.relocation.undo_move import UndoMove


class UndoLookAhead:
    """Checks that no process uses a folder that the undo moves, and that there is space for all copies together.

    This is the first step of an undo, and it applies nothing. A blocked step stops the undo before its first change.
    """

    name = "look ahead"
    essential = True
    local = True

    def __init__(self, moves: Sequence[UndoMove | UndoMergeStep], root: Root, home: Path) -> None:
        """Take the steps of the undo that move or copy folders, the root, and the home folder."""
        self.moves = moves
        self.root = root
        self.home = home

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        return "check that no process uses the folders, and the free space"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (there is no deeper check)
        """Check the folders of all steps together; return OK, or raise an error.

        Raises:
            BlockedError: a process uses a folder, space or inodes are short, a folder cannot be moved, or the records
                of the volume cannot be read or written.
        """
        links.recorded(self.root, current(self.home))
        preflight.require_writable(self.root.state)
        folders = [folder for move in self.moves for folder in move.folders_to_leave()]
        if folders:
            preflight.require_unused(folders)
        size = self._require_space()
        return Check(State.OK, f"no process uses the {len(folders)} folders to restore; {size:,} bytes to copy")

    def apply(self) -> None:
        """Do nothing, because the check never returns DRIFTED."""

    def _require_space(self) -> int:
        """Check that each file system has space for all copies on it, and return the bytes of all copies."""
        sizes: dict[int, tuple[Path, tree.TreeSize, tree.TreeSize]] = {}
        for move in self.moves:
            size = move.size_to_copy()
            if size.inodes == 0:
                continue
            folder = preflight.existing_folder(move.pair.source.parent)
            _, needed, copied = sizes.setdefault(folder.stat().st_dev, (folder, tree.TreeSize(), tree.TreeSize()))
            needed += size
            copied += _measured(move.unfinished_copy)
        copies = [kept_for(move.pair.target, move.others) for move in self.moves if move.others]
        reason = f" The folders are copied: {'; '.join(copies)}." if copies else ""
        for folder, needed, copied in sizes.values():
            preflight.require_space(needed, copied, folder, f"Free some space, then run again.{reason}")
        return sum(needed.bytes for _, needed, _ in sizes.values())


def _measured(folder: Path) -> tree.TreeSize:
    """Return the size of a folder tree; a size of zero if the path is missing, a link or a file."""
    if link_target(folder) is not None or not folder.is_dir():
        return tree.TreeSize()
    with OpenDir.at(folder) as opened:
        return tree.measure(opened)
