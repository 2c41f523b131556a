"""Parts two folders that were merged: what came from the home goes back to it, the volume's is as it was."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from typing import TYPE_CHECKING, Any

from provision.core.step import Check, State
from provision.fs import tree
from provision.fs.copy_tree import TreeCopy
from provision.fs.merge_tree import MergeEntry, TreeMerge, holding
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import preflight
from provision.volume import relink
from provision.volume.journal_acts import LinkReplacement, MergeCleanup, MergeSplit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.relocation.move import MovePair
    from provision.volume.journal import Journal

_SHOWN = 10
_LISTED = {"same", "added", "within"}  # what lies in such a folder has rows of its own


class UndoMergeStep:
    """The old path is a real folder again, and holds what it held when it was merged."""

    essential = False
    local = True

    def __init__(self, pair: MovePair, manifests: Sequence[Path], root: Root, home: Path, journal: Journal) -> None:
        """Take the pair, and what each merge of it has put on record, oldest first."""
        self.name = f"folder {pair.source.name}"
        self.pair = pair
        self.manifests = manifests
        self.root = root
        self.home = home
        self.journal = journal

    def describe(self) -> str:
        """The plan's line."""
        return f"part {self.pair.target} into itself and {self.pair.source}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (sizes and times tell)
        """Look whether the merge stands as it was made."""
        source, target = self.pair.source, self.pair.target
        lost = [path for path in self.manifests if not path.exists()]
        if lost:
            return Check(State.BLOCKED, f"what was merged into {target} is not on record any more: gc dropped it")
        rows = self._rows()
        found = link_target(source)
        if found is not None and found != str(target):
            return Check(
                State.BLOCKED, f"{source} leads to {found} now, and not to {target}. Look at it: ls -l {source}"
            )
        if found is None and source.exists():
            return self._check_real(rows)
        changed = [row.kept_at for row in rows if row.kind != "folder" and not self._is_there(row)]
        if changed:
            listed = "\n".join(f"  changed or gone: {target / path}" for path in changed[:_SHOWN])
            return Check(State.BLOCKED, f"{len(changed)} files were changed since they were merged:\n{listed}")
        return Check(State.DRIFTED, f"{source} was merged into {target}")

    def _check_real(self, rows: Sequence[MergeEntry]) -> Check:
        """The old path is a folder: ours of an undo that was killed, or another."""
        source, target = self.pair.source, self.pair.target
        left = [row for row in rows if self._is_left(row) and (row.kind != "folder" or row.action not in _LISTED)]
        if not left:
            prepared = os.path.lexists(self.pair.partial) or link_target(self.pair.aside) == str(target)
            return Check(State.DRIFTED if prepared else State.OK, f"{source} is a folder, as it was")
        absent = [row.path for row in left if not os.path.lexists(source / row.path)]
        if absent:
            listed = "\n".join(f"  not there: {source / path}" for path in absent[:_SHOWN])
            return Check(State.BLOCKED, f"{source} is a folder now, without what {target} has of it:\n{listed}")
        return Check(State.DRIFTED, f"{target} still holds what came from {source}")

    def apply(self) -> None:
        """Copy back, prove, let the folder have its path, then take out of the volume what had come."""
        source, target = self.pair.source, self.pair.target
        rows = self._rows()
        preflight.require_unused([target.resolve()])
        with OpenDir.at(source.parent) as home, OpenDir.at(target.parent) as there, there.enter(target.name) as merged:
            if link_target(source) is not None or not source.exists():
                spare = self.pair.aside.name
                tree.remove(home, spare)
                self.journal.record(MergeSplit(source, target, partial=source.with_name(spare), whole=target))
                home.make(spare)
                with home.enter(spare) as back:
                    self._copy_back(merged, back, rows)
                    _dress_top(back, merged)
                    back.sync_file_system()
                self.journal.record(LinkReplacement(source, whole=source.with_name(spare)))
                if link_target(source) is not None:
                    home.unlink(source.name)
                home.rename(spare, home, source.name)
                home.sync()
            self.journal.record(MergeCleanup(target, whole=source))
            with home.enter(source.name) as back:
                for row in reversed(rows):
                    if self._is_left(row) and (_is_linked_only(merged, row) or self._is_back(merged, back, row)):
                        self._take_out(merged, row)
            # What a killed merge has prepared.
            tree.remove(there, self.pair.partial.name)
            if home.readlink(self.pair.aside.name) == str(target):
                home.unlink(self.pair.aside.name)
            merged.sync_file_system()
        relink.forget(self.root, self.home, source)

    def _rows(self) -> list[MergeEntry]:
        """The rows of every merge of the run, the first that names an entry counts."""
        found: dict[str, MergeEntry] = {}
        for path in self.manifests:
            rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="ascii"))
            for each in rows:
                row = MergeEntry(**each)
                if row.path not in found or found[row.path].action == "same":
                    found[row.path] = row
        return list(found.values())

    def _is_there(self, row: MergeEntry) -> bool:
        found = None
        with contextlib.suppress(OSError):
            found = os.lstat(self.pair.target / row.kept_at)
        if found is None:
            return False
        return (
            row.kind == "folder"
            or (found.st_size, found.st_mtime_ns) == (row.size, row.mtime_ns)
            or row.action == "same"
        )

    def _copy_back(self, merged: OpenDir, back: OpenDir, rows: Sequence[MergeEntry]) -> None:
        mirror = TreeCopy([])
        for row in rows:
            with holding(back, row.path) as (place, name):
                if row.kind == "folder" and row.action in _LISTED:
                    place.make(name)
                elif row.kind == "folder":
                    with holding(merged, row.kept_at) as (kept, other), kept.enter(other) as first:
                        place.make(name)
                        with place.enter(name) as second:
                            TreeCopy([(first, second)]).run()
                elif row.twin is not None:
                    with holding(back, row.twin) as (first_place, first_name):
                        first_place.hardlink(first_name, place, name)
                else:
                    with holding(merged, row.kept_at) as (kept, other):
                        mirror.copy_entry(kept, other, place, name)
        for row in reversed(rows):  # a folder's time after what lies in it
            with holding(back, row.path) as (place, name):
                place.set_mode_and_mtime(name, row.mode, row.mtime_ns)

    def _take_out(self, merged: OpenDir, row: MergeEntry) -> None:
        """Take one entry out of the merged folder; one that has been changed or filled since stays."""
        with contextlib.suppress(FileNotFoundError), holding(merged, row.kept_at) as (kept, name):
            if row.kind == "folder" and row.action in _LISTED:
                with contextlib.suppress(OSError):
                    kept.rmdir(name)
            elif row.action == "newer" and row.other is not None:
                if _is_linked_only(merged, row):
                    kept.unlink(row.other.rpartition("/")[2])
                    return
                if kept.lstat(name) is not None and not self._is_there(row):
                    return
                if row.kind == "folder":
                    tree.remove(kept, name)
                # What was there before takes its name back, in one act.
                kept.rename(row.other.rpartition("/")[2], kept, name)
            else:
                tree.remove(kept, name)

    def _is_back(self, merged: OpenDir, back: OpenDir, row: MergeEntry) -> bool:
        """Whether the old path holds this entry, byte by byte: nothing leaves the volume before."""
        if row.kind == "folder" and row.action in _LISTED:
            return True  # it is taken away only when it is empty
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            holding(merged, row.kept_at) as (kept, name),
            holding(back, row.path) as (place, there),
        ):
            if kept.lstat(name) is None:
                return True  # an earlier undo has taken it out
            if row.kind != "folder":
                return TreeCopy([]).is_equal(kept, place, name, there)
            with kept.enter(name) as first, place.enter(there) as second:
                return all(each.action == "same" for each in TreeMerge(first, second, second).look())
        return False

    def _is_left(self, row: MergeEntry) -> bool:
        """Whether the volume still holds what this entry brought."""
        if row.action == "newer" and row.other is not None:
            return os.path.lexists(self.pair.target / row.other)
        return row.action != "same" and self._is_there(row)


def _is_linked_only(merged: OpenDir, row: MergeEntry) -> bool:
    """Return whether what was to give way has its second name, and its own still: the merge was killed between."""
    if row.action != "newer" or row.other is None:
        return False
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), holding(merged, row.path) as (kept, name):
        first, second = kept.lstat(name), kept.lstat(row.other.rpartition("/")[2])
        return first is not None and second is not None and os.path.samestat(first, second)
    return False


def _dress_top(back: OpenDir, merged: OpenDir) -> None:
    """Give the folder that comes back the mode of the merged one: the record has no mode of the folder itself."""
    if back.descriptor is not None and merged.descriptor is not None:
        os.fchmod(back.descriptor, stat.S_IMODE(os.fstat(merged.descriptor).st_mode))
