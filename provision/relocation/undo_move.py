"""Moves a relocated folder back to its old path, or copies it back if links of other owners lead to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, FirstlightError
from provision.core.progress import no_progress
from provision.core.step import Check, State
from provision.fs import tree
from provision.fs.copy_tree import TreeCopy
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import preflight
from provision.relocation.move import FolderMove
from provision.relocation.move_pair import MovePair
from provision.volume import journal_acts as acts
from provision.volume import link_files, volume_capabilities
from provision.volume.changes import make_folders

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.fs.kept_metadata import KeptMetadata
    from provision.volume.journal import Journal
    from provision.volume.link_uses import LinkUse

_SHOWN = 3


@dataclass(frozen=True)
class MoveHistory:
    """Hold the facts about one move and its undos that the journals record.

    Attributes:
        committed: the run completed its copy, or renamed the folder; False: it was killed before.
        original_may_remain: the run was killed after its copy was complete, so the original folder may still be at the
            old path.
        undo_placed: an interrupted undo was about to put the folder at the old path.
        undo_split: an undo of a later merge made a folder at the old path.
        earlier_target: the path that the target had at the time of the run.
    """

    committed: bool
    original_may_remain: bool
    undo_placed: bool
    undo_split: bool
    earlier_target: Path


class UndoMove:
    """Moves a relocated folder back to its old path, with all files that were added since.

    If links of other owners lead to the folder, it is copied back and also stays on the volume, so that these links
    keep their target.
    """

    essential = False
    local = True

    def __init__(
        self,
        pair: MovePair,
        root: Root,
        home: Path,
        journal: Journal,
        progress: Progress = no_progress,
        *,
        history: MoveHistory,
        others: Sequence[LinkUse] = (),
    ) -> None:
        """Take the paths of the move, its history, and the links of other owners that lead to the target."""
        self.name = f"folder {pair.source.name}"
        self.pair = pair
        self.root = root
        self.home = home
        self.journal = journal
        self.progress = progress
        self.history = history
        self.others = others
        self._back = MovePair(pair.target, pair.source)
        self._has_placed = history.undo_placed

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        if self.others:
            return f"copy {self.pair.target} back to {self.pair.source}; {kept_for(self.pair.target, self.others)}"
        return f"move {self.pair.target} back to {self.pair.source}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a path has no deeper check)
        """Check whether the folder is at its old path or at its target, and that it can be moved back.

        Raises:
            BlockedError: a folder is not writable or not safe, or a file system is mounted inside.
        """
        check = self._place()
        if check.state is State.DRIFTED:
            self._require_possible()
        return check

    @property
    def unfinished_copy(self) -> Path:
        """Return the path of the unfinished copy that an interrupted undo leaves; the next undo completes this copy."""
        return self._back.partial

    def folders_to_leave(self) -> list[Path]:
        """Return the folders that `apply` would move or copy, and that no process may use at that time."""
        if not self.history.committed or self._place().state is not State.DRIFTED:
            return []
        paths = (self.pair.target, self.pair.aside)
        return [path.resolve() for path in paths if link_target(path) is None and path.is_dir()]

    def size_to_copy(self) -> tree.TreeSize:
        """Return the size of the copy that `apply` would make; zero if a rename is enough.

        Raises:
            BlockedError: an entry belongs to another user, or is a mount point.
        """
        size = tree.TreeSize()
        if self.pair.target.resolve() not in self.folders_to_leave():
            return size
        parent = preflight.existing_folder(self.pair.source.parent)
        if self.others or not preflight.is_one_mount(self.pair.target.parent, parent):
            with OpenDir.at(self.pair.target) as folder:
                size = tree.measure(folder)
            preflight.require_movable(size, has_owners=self._kept.owners)
        return size

    def apply(self) -> None:
        """Remove the link, move or copy the folder back, and remove unfinished copies of the run.

        Raises:
            BlockedError: a process uses the folder, or space is short; the link exists again.
        """
        source, target = self.pair.source, self.pair.target
        preflight.require_unused(self.folders_to_leave())
        if self.pair.unfinished and link_target(source) == str(target):
            # A killed move has left the original beside the link. Complete the move, so that all its files move back.
            can = volume_capabilities.ensure(self.root)
            FolderMove(self.journal, self.progress, can).run([self.pair])
        with OpenDir.at(target.parent) as target_parent:
            if self.history.committed and (os.path.lexists(target) or self._back.unfinished):
                if self.others:
                    self._copy_back()
                else:
                    self._move_back()
            if link_target(target) == str(source):
                target_parent.unlink(target.name)
            if link_target(self.pair.aside) in self._targets:
                self.pair.aside.unlink()  # a killed move has made this link under its temporary name
            tree.remove(target_parent, self.pair.partial.name)
            target_parent.sync()
        link_files.forget(self.root, self.home, source)

    @property
    def _kept(self) -> KeptMetadata:
        """Return the metadata that the root's file system keeps."""
        return volume_capabilities.known(self.root).kept

    @property
    def _targets(self) -> set[str | None]:
        """Return the texts that the run's link can have: the target's present path, and its path during the run."""
        return {str(self.pair.target), str(self.history.earlier_target)}

    def _place(self) -> Check:
        source, target = self.pair.source, self.pair.target
        if not self.history.committed:
            has_partial = os.path.lexists(self.pair.partial)
            return Check(State.DRIFTED if has_partial else State.OK, f"{source} was not moved")
        obstacle = self._obstacle()
        if obstacle is not None:
            return Check(State.BLOCKED, obstacle)
        is_at_target = os.path.lexists(target) or self._back.unfinished
        if link_target(source) is None and source.is_dir():
            if is_at_target:
                return self._check_real_folder()
            has_partial = os.path.lexists(self.pair.partial)
            return Check(State.DRIFTED if has_partial else State.OK, f"{source} is a folder, as before the run")
        if not is_at_target:
            return Check(State.BLOCKED, f"{target} is missing, so it cannot be moved back to {source}")
        return Check(State.DRIFTED, f"the data of {source} is at {target}")

    def _obstacle(self) -> str | None:
        """Return why the old path or the target is not as the run left it, with the next command; else None."""
        source, target = self.pair.source, self.pair.target
        destination, redirected = link_target(source), link_target(target)
        # A killed undo leaves the link that it made for the exchange, which leads to its own path.
        if destination is not None and destination not in {*self._targets, str(source)}:
            return f"{source} is a link to {destination} now, not to {target}. Look at the link: ls -l {source}"
        if redirected not in {None, str(source)}:
            return f"{target} is a link to {redirected} now. Look at the link: ls -l {target}"
        if destination is None and os.path.lexists(source) and not source.is_dir():
            return f"{source} is a file now. Move this file away, then run again: ls -l {source}"
        return None

    def _check_real_folder(self) -> Check:
        """Check a real folder at the old path if the target exists, too.

        The folder comes from an interrupted run or undo, or it is not firstlight's.
        """
        source, target = self.pair.source, self.pair.target
        is_ours = self.history.original_may_remain or self._has_placed
        if self.others and is_ours and not os.path.lexists(self.pair.aside):
            is_clean = not self._back.unfinished and not os.path.lexists(self.pair.partial)
            detail = f"{source} is a folder again; {kept_for(target, self.others)}"
            return Check(State.OK if is_clean else State.DRIFTED, detail)
        if is_ours or (self.history.undo_split and not self.others) or link_target(target) == str(source):
            return Check(State.DRIFTED, f"the data of {source} is also at {target}")
        with OpenDir.at(source) as folder:
            is_filled = not tree.is_empty(folder)
        if is_filled or self.others:
            return Check(
                State.BLOCKED,
                f"{source} is a real folder now, not the link that the run left; the data of the run is at "
                f"{target}. Move the folder away, then run again: mv {source} {source}.own",
            )
        return Check(State.DRIFTED, f"{source} is an empty folder; its data is at {target}")

    def _require_possible(self) -> None:
        source, target = self.pair.source, self.pair.target
        preflight.require_writable(source.parent)
        with OpenDir.at(preflight.existing_folder(source.parent)) as parent:
            preflight.require_safe_parent(parent)
        preflight.require_no_mount(target)
        if not self.others:
            preflight.require_writable(target.parent)
            if self._kept.modes:  # skipped if the modes on the volume are fixed
                with OpenDir.at(preflight.existing_folder(target.parent)) as parent:
                    preflight.require_safe_parent(parent)

    def _move_back(self) -> None:
        """Move the folder to its old path; if the move fails, make the link there again."""
        source, target = self.pair.source, self.pair.target
        text = link_target(source)
        if text in self._targets:
            self.journal.record(acts.LinkReplacement(source, whole=target))
            with OpenDir.at(source.parent) as parent:
                parent.unlink(source.name)
        try:
            FolderMove(self.journal, self.progress, kept=self._kept).run([self._back])
        except (FirstlightError, OSError):
            if text in self._targets and text is not None and not os.path.lexists(source) and target.is_dir():
                with OpenDir.at(source.parent) as parent:
                    parent.symlink(source.name, text)
                    parent.sync()
            raise

    def _copy_back(self) -> None:
        """Copy the folder beside its old path and verify the copy, then replace the link by the copy."""
        source, target = self.pair.source, self.pair.target
        partial = self._back.partial
        make_folders(source.parent, self.journal)
        with OpenDir.at(source.parent) as parent, OpenDir.at(target) as original:
            if not self._has_placed or link_target(source) is not None or not source.exists():
                self.journal.record(acts.FolderCopy(target, source, partial, whole=target))
                try:
                    self._copy(original, parent, partial.name)
                except OSError:
                    tree.remove(parent, partial.name)  # a full disk also stops other programs
                    raise
                self.journal.record(acts.CopyPlacement(target, source, partial, whole=target))
                self._has_placed = True
                if link_target(source) is not None:
                    parent.unlink(source.name)
                parent.rename(partial.name, parent, source.name)
            tree.remove(parent, partial.name)
            parent.sync()

    def _copy(self, original: OpenDir, parent: OpenDir, name: str) -> None:
        if parent.lstat(name) is None:
            parent.make(name)
        with parent.enter(name) as copy:
            if copy.descriptor is not None and os.fstat(copy.descriptor).st_uid != os.geteuid():
                raise BlockedError(f"{copy.path} belongs to another user. Look at the folder: ls -ld {copy.path}")
            total = tree.measure(original)
            totals = {"bytes": total.data, "files": total.files, "files proved": total.files}
            progress = lambda count, unit: self.progress(count, totals[unit], unit)  # noqa: E731 (a def is longer)
            TreeCopy([(original, copy)], progress, kept=self._kept).run()
            copy.sync_file_system()


def kept_for(target: Path, others: Sequence[LinkUse]) -> str:
    """Return a clause for messages: the volume keeps the folder `target`, because the links `others` lead there."""
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    verb = "leads" if len(others) == 1 else "lead"
    return f"the volume keeps {target}, because {', '.join(map(str, others[:_SHOWN]))}{more} {verb} there"
