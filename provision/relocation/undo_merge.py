"""Undoes the merge of two folders: the files of the home return to their old path, the others stay on the volume."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.core.step import Check, State
from provision.fs import records, tree
from provision.fs.copy_tree import TreeCopy
from provision.fs.merge_tree import MergeEntry, TreeMerge, open_parent
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import preflight
from provision.relocation.undo_move import kept_for
from provision.volume import link_files, volume_capabilities
from provision.volume.journal_acts import LinkReplacement, MergeCleanup, MergeSplit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.fs.kept_metadata import KeptMetadata
    from provision.relocation.move_pair import MovePair
    from provision.volume.journal import Journal
    from provision.volume.link_uses import LinkUse

_SHOWN = 10
# The entries of a folder with one of these actions are listed themselves. Another folder counts as a whole.
_ACTIONS = {"same", "added", "within", "newer", "older"}  # as in MergeEntry
_LISTED = {"same", "added", "within"}


class UndoMergeStep:
    """Makes a real folder at the old path of a merged folder, with the entries that it had before the merge.

    If links of other owners lead to the merged folder, the entries also stay on the volume.
    """

    essential = False
    local = True

    def __init__(
        self,
        pair: MovePair,
        manifests: Sequence[Path],
        root: Root,
        home: Path,
        journal: Journal,
        *,
        earlier_target: Path,
        others: Sequence[LinkUse] = (),
    ) -> None:
        """Take the paths, the merges of the run, and the links of other owners.

        Args:
            pair: the old path and the target of the folder.
            manifests: the file of each merge of the run that lists its entries, oldest first.
            root: the root.
            home: the home folder.
            journal: the journal of the undo.
            earlier_target: the path that the target had at the time of the run.
            others: the links of other owners that lead to the target.
        """
        self.name = f"folder {pair.source.name}"
        self.pair = pair
        self.manifests = manifests
        self.root = root
        self.home = home
        self.journal = journal
        self.earlier_target = earlier_target
        self.others = others

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        if self.others:
            return f"copy the files that came from {self.pair.source} back; {kept_for(self.pair.target, self.others)}"
        return f"move the files that came from {self.pair.source} out of {self.pair.target}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (sizes and times are enough)
        """Check that the merged files are unchanged; BLOCKED if a file has changed, or the list of files was deleted.

        Raises:
            BlockedError: a folder is not writable or not safe, or a file system is mounted inside.
        """
        check = self._place()
        if check.state is State.DRIFTED:
            preflight.require_writable(self.pair.source.parent)
            preflight.require_no_mount(self.pair.target)
            if not self.others:
                preflight.require_writable(self.pair.target)
        return check

    @property
    def unfinished_copy(self) -> Path:
        """Return the path of the unfinished copy that an interrupted undo leaves; the next undo replaces this copy."""
        return self.pair.aside

    def folders_to_leave(self) -> list[Path]:
        """Return the folders (one or none) that `apply` would change, and that no process may use at that time."""
        return [self.pair.target.resolve()] if self._place().state is State.DRIFTED else []

    def size_to_copy(self) -> tree.TreeSize:
        """Return the size of the copy that `apply` would make."""
        size = tree.TreeSize()
        if not self.folders_to_leave() or (link_target(self.pair.source) is None and self.pair.source.is_dir()):
            return size
        with OpenDir.at(self.pair.target) as merged:
            for entry in self._entries():
                if entry.kind != "folder" or entry.action in _LISTED:
                    blocks = -(-entry.size // tree.BLOCK) if entry.kind == "file" and entry.twin is None else 1
                    size += tree.TreeSize(bytes=blocks * tree.BLOCK, inodes=entry.twin is None)
                else:
                    with open_parent(merged, entry.kept_at) as (parent, name), parent.enter(name) as folder:
                        size += tree.measure(folder)
        return size

    @property
    def _targets(self) -> set[str | None]:
        """Return the texts that the run's link can have: the target's present path, and its path during the run."""
        return {str(self.pair.target), str(self.earlier_target)}

    def _place(self) -> Check:
        source, target = self.pair.source, self.pair.target
        if any(not path.exists() for path in self.manifests):
            return Check(
                State.BLOCKED,
                f"the list of files that were merged into {target} was deleted by gc, so this merge cannot be undone",
            )
        entries = self._entries()
        destination = link_target(source)
        if destination is not None and destination not in self._targets:
            return Check(
                State.BLOCKED,
                f"{source} is a link to {destination} now, not to {target}. Look at the link: ls -l {source}",
            )
        if destination is None and source.exists():
            return self._check_real(entries)
        changed = [
            entry.kept_at
            for entry in entries
            if (entry.kind != "folder" or entry.action not in _LISTED) and not self._is_unchanged(entry)
        ]
        if changed:
            listed = "\n".join(f"  changed or missing: {target / path}" for path in changed[:_SHOWN])
            return Check(
                State.BLOCKED,
                f"{len(changed)} files have changed since the merge. Restore them, then run again:\n{listed}",
            )
        return Check(State.DRIFTED, f"{source} was merged into {target}")

    def _check_real(self, entries: Sequence[MergeEntry]) -> Check:
        """Check a real folder at the old path: it comes from an interrupted undo, or it is not firstlight's."""
        source, target = self.pair.source, self.pair.target
        on_volume = [
            entry
            for entry in entries
            if self._is_on_volume(entry) and (entry.kind != "folder" or entry.action not in _LISTED)
        ]
        is_prepared = os.path.lexists(self.pair.partial) or link_target(self.pair.aside) in self._targets
        if not on_volume:
            is_left = not self.others and any(self._is_left_empty(entry) for entry in entries)
            is_unfinished = is_prepared or is_left
            return Check(State.DRIFTED if is_unfinished else State.OK, f"{source} is a folder, as before the run")
        with OpenDir.at(source) as restored, OpenDir.at(target) as merged:
            different = [entry.path for entry in on_volume if not self._may_be_deleted(merged, restored, entry)]
        if different:
            listed = "\n".join(f"  missing or different: {source / path}" for path in different[:_SHOWN])
            return Check(
                State.BLOCKED,
                f"{source} is a folder that lacks files which were merged into {target}. Move this folder away, then "
                "run again:\n"
                f"{listed}",
            )
        if self.others and not is_prepared:
            return Check(State.OK, f"{source} is a folder again; {kept_for(target, self.others)}")
        return Check(State.DRIFTED, f"{target} still holds files that came from {source}")

    def apply(self) -> None:
        """Copy the entries back, rename the copy to the old path, then delete each verified entry from the volume."""
        source, target = self.pair.source, self.pair.target
        entries = self._entries()
        preflight.require_unused([target.resolve()])
        with (
            OpenDir.at(source.parent) as source_parent,
            OpenDir.at(target.parent) as target_parent,
            target_parent.enter(target.name) as merged,
        ):
            if link_target(source) is not None or not source.exists():
                temporary = self.pair.aside.name
                tree.remove(source_parent, temporary)
                self.journal.record(MergeSplit(source, target, partial=self.pair.aside, whole=target))
                source_parent.make(temporary)
                try:
                    with source_parent.enter(temporary) as restored:
                        self._copy_back(merged, restored, entries)
                        _copy_mode(merged, restored, self._kept)
                        restored.sync_file_system()
                except OSError:
                    tree.remove(source_parent, temporary)  # a full disk also stops other programs
                    raise
                self.journal.record(LinkReplacement(source, whole=self.pair.aside))
                if link_target(source) is not None:
                    source_parent.unlink(source.name)
                source_parent.rename(temporary, source_parent, source.name)
                source_parent.sync()
            if not self.others:
                self._separate(merged, source_parent, entries)
            # A killed merge leaves an unfinished copy and a link under a temporary name.
            tree.remove(target_parent, self.pair.partial.name)
            if source_parent.readlink(self.pair.aside.name) in self._targets:
                source_parent.unlink(self.pair.aside.name)
            merged.sync_file_system()
        link_files.forget(self.root, self.home, source)

    def _separate(self, merged: OpenDir, source_parent: OpenDir, entries: Sequence[MergeEntry]) -> None:
        """Delete from the merged folder on the volume each entry that the old path has with the same content."""
        self.journal.record(MergeCleanup(self.pair.target, whole=self.pair.source))
        with source_parent.enter(self.pair.source.name) as restored:
            for entry in reversed(entries):
                if self._is_on_volume(entry) and self._may_be_deleted(merged, restored, entry):
                    self._delete(merged, entry)

    def _entries(self) -> list[MergeEntry]:
        """Return one entry for each path: the first in the manifests whose action is not "same", if there is one."""
        entries: dict[str, MergeEntry] = {}
        for path in self.manifests:
            try:
                listed = [_entry(row) for row in records.rows(records.read_json(path, follow_links=False))]
            except (ValueError, KeyError):
                raise BlockedError(
                    f"{path} is damaged, so this merge cannot be undone. Look at this file: cat {path}"
                ) from None
            for entry in listed:
                if entry.path not in entries or entries[entry.path].action == "same":
                    entries[entry.path] = entry
        return list(entries.values())

    def _is_unchanged(self, entry: MergeEntry) -> bool:
        """Return whether the target still has the entry, with the size and modification time in the manifest.

        A folder, or an entry that both folders had equally, only needs to exist.
        """
        status = None
        with contextlib.suppress(OSError):
            status = os.lstat(self.pair.target / entry.kept_at)
        if status is None:
            return False
        is_equal = status.st_size == entry.size and self._kept.is_same_time(status.st_mtime_ns, entry.mtime_ns)
        return entry.kind == "folder" or is_equal or entry.action == "same"

    @functools.cached_property
    def _kept(self) -> KeptMetadata:
        """Return the metadata that the file system of the volume keeps."""
        return volume_capabilities.known(self.root).kept

    def _copy_back(self, merged: OpenDir, restored: OpenDir, entries: Sequence[MergeEntry]) -> None:
        tree_copy = TreeCopy([], kept=self._kept)
        for entry in entries:
            with open_parent(restored, entry.path) as (parent, name):
                if entry.kind == "folder" and entry.action in _LISTED:
                    parent.make(name)
                elif entry.kind == "folder":
                    with open_parent(merged, entry.kept_at) as (kept_parent, kept), kept_parent.enter(kept) as original:
                        parent.make(name)
                        with parent.enter(name) as copy:
                            TreeCopy([(original, copy)], kept=self._kept).run()
                elif entry.twin is not None:
                    with open_parent(restored, entry.twin) as (twin_parent, twin):
                        twin_parent.hardlink(twin, parent, name)
                else:
                    with open_parent(merged, entry.kept_at) as (kept_parent, kept):
                        tree_copy.copy_entry(kept_parent, kept, parent, name)
        for entry in reversed(entries):  # a folder comes after its entries, because they change its time
            with open_parent(restored, entry.path) as (parent, name):
                parent.set_mode_and_mtime(name, entry.mode, entry.mtime_ns)

    def _delete(self, merged: OpenDir, entry: MergeEntry) -> None:
        """Delete one entry from the merged folder, unless it has changed or is a folder with new files."""
        with contextlib.suppress(FileNotFoundError), open_parent(merged, entry.kept_at) as (parent, name):
            if entry.kind == "folder" and entry.action in _LISTED:
                with contextlib.suppress(OSError):
                    parent.rmdir(name)
            elif entry.action == "newer" and entry.other is not None:
                if _has_two_names(merged, entry):
                    parent.unlink(entry.other.rpartition("/")[2])
                    return
                if parent.lstat(name) is not None and not self._is_unchanged(entry):
                    return
                if entry.kind == "folder":
                    tree.remove(parent, name)
                # The volume's earlier version gets its name back, and replaces the entry atomically.
                parent.rename(entry.other.rpartition("/")[2], parent, name)
            else:
                tree.remove(parent, name)

    def _may_be_deleted(self, merged: OpenDir, restored: OpenDir, entry: MergeEntry) -> bool:
        """Return whether an entry can be deleted from the volume: the old path has it, or it has two names there."""
        return _has_two_names(merged, entry) or self._is_restored(merged, restored, entry)

    def _is_restored(self, merged: OpenDir, restored: OpenDir, entry: MergeEntry) -> bool:
        """Return whether the entry at the old path is equal to the entry on the volume, or the latter is deleted."""
        if entry.kind == "folder" and entry.action in _LISTED:
            return True  # `_delete` removes it only if it is empty
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            open_parent(merged, entry.kept_at) as (kept_parent, kept),
            open_parent(restored, entry.path) as (parent, name),
        ):
            if kept_parent.lstat(kept) is None:
                return True  # an earlier undo has deleted it
            if entry.kind != "folder":
                return TreeCopy([], kept=self._kept).is_equal(kept_parent, parent, kept, name)
            with kept_parent.enter(kept) as original, parent.enter(name) as copy:
                return all(row.action == "same" for row in TreeMerge(original, copy, copy).compare())
        return False

    def _is_left_empty(self, entry: MergeEntry) -> bool:
        """Return whether the entry is a folder that the merge has added to the volume, and that is empty now."""
        folder = self.pair.target / entry.path
        return entry.action in {"added", "within"} and entry.kind == "folder" and folder.is_dir() and _is_empty(folder)

    def _is_on_volume(self, entry: MergeEntry) -> bool:
        """Return whether an entry that came from the old path is still on the volume."""
        if entry.action == "newer" and entry.other is not None:
            return os.path.lexists(self.pair.target / entry.other)
        return entry.action != "same" and self._is_unchanged(entry)


def _entry(row: dict[str, object]) -> MergeEntry:
    """Return the entry of a row of a manifest.

    Raises:
        ValueError, KeyError: a value is missing or wrong, or a path leads out of the folder.
    """
    path, kind, action = (records.typed(row[key], str) for key in ("path", "kind", "action"))
    other, twin = (None if row.get(key) is None else records.typed(row[key], str) for key in ("other", "twin"))
    for text in (path, other, twin):
        if text is not None and any(part in {"", ".", ".."} for part in text.split("/")):
            raise ValueError("a path that leads out of the folder")
    if action not in _ACTIONS:
        raise ValueError("an unknown action")
    mode, size, time_ns = records.number(row["mode"]), records.number(row["size"]), records.typed(row["mtime_ns"], int)
    if mode != stat.S_IMODE(mode) or not -(1 << 63) <= time_ns < 1 << 63:
        raise ValueError("a mode or a time out of range")
    return MergeEntry(path, kind, action, other, mode, size, time_ns, twin)


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def _has_two_names(merged: OpenDir, entry: MergeEntry) -> bool:
    """Return whether the volume's version of a file has both its old and its new name, because a run was killed."""
    if entry.action != "newer" or entry.other is None:
        return False
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), open_parent(merged, entry.path) as (parent, name):
        first, second = parent.lstat(name), parent.lstat(entry.other.rpartition("/")[2])
        return first is not None and second is not None and os.path.samestat(first, second)
    return False


def _copy_mode(merged: OpenDir, restored: OpenDir, kept: KeptMetadata) -> None:
    """Give the restored folder the mode of the merged folder, because the manifest has only the modes of its entries.

    If the modes on the volume are fixed, the restored folder keeps the mode 0700.
    """
    if kept.modes and restored.descriptor is not None and merged.descriptor is not None:
        os.fchmod(restored.descriptor, stat.S_IMODE(os.fstat(merged.descriptor).st_mode))
