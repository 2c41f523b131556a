"""Moves folders to the volume and leaves links; at every time one path, named in the journal, has the complete data."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, FirstlightError
from provision.core.progress import no_progress
from provision.fs import foreign_writers, tree
from provision.fs.capabilities import UNTESTED
from provision.fs.copy_tree import TreeCopy
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import merge_manifest, preflight, whole_folders
from provision.relocation.move_pair import MovePair, OpenPair, beside, has_set_group_id, open_parents, partial_folder
from provision.volume import journal_acts as acts
from provision.volume.changes import make_folders

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from provision.core.progress import Progress
    from provision.fs.capabilities import Capabilities
    from provision.fs.kept_metadata import KeptMetadata
    from provision.fs.merge_tree import MergeEntry, TreeMerge
    from provision.volume.journal import Journal

# The kernel or the file system does not support the exchange of two names (renameat2). A rename may still work.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}
_ROUNDS = 5  # comparisons of a merge, while another host writes into the target
_FULL = {errno.ENOSPC, errno.EDQUOT}


class FolderMove:
    """Moves the folders of one label together, so that hard links between the folders are kept.

    `conflicts` has the path of each older version of a file that a merge kept beside the newer version. `kept_whole`
    has a text for each whole folder, such as an environment, that a merge kept beside the target's folder.
    """

    def __init__(
        self,
        journal: Journal,
        progress: Progress = no_progress,
        target: Capabilities = UNTESTED,
        kept: KeptMetadata | None = None,
    ) -> None:
        """Take the journal, which records each act before it is done, and the progress callback.

        `target` has the features of the file system of the targets. `kept` is the metadata that the file systems of the
        sources and of the targets keep; default: the metadata that the file system of the targets keeps.
        """
        self.journal = journal
        self.progress = progress
        self.target = target
        self.kept = kept or target.kept
        self.conflicts: list[str] = []
        self.kept_whole: list[str] = []

    def run(self, pairs: Sequence[MovePair]) -> None:
        """Move each source folder to its target and replace it by a link.

        A source and a target that both contain files are merged. A missing source becomes a link to an empty target.
        The work of a killed run is completed.

        Raises:
            BlockedError: a process uses the folder, an entry belongs to another user, space is short, or a file
                system is mounted inside.
            FirstlightError: a copy differs from its original.
            OSError: a system call failed; no data is lost, and the next run continues.
        """
        real = [pair for pair in pairs if link_target(pair.source) is None and pair.source.is_dir()]
        for pair in pairs:
            if pair not in real:
                self._run([pair])  # one pair at a time, because each pair needs two open descriptors
        self._run(real)

    def _run(self, pairs: Sequence[MovePair]) -> None:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(open_parents(pair, self.journal)) for pair in pairs]
            for pair in opened:
                self._remove_prepared_links(pair)
            real = [pair for pair in opened if pair.source_is_real]
            self._check(real)
            to_merge = [pair for pair in real if pair.target_is_filled]
            to_copy = [pair for pair in real if pair not in to_merge and not self._try_rename(pair)]
            if to_copy:
                self._copy(to_copy)
            for pair in to_merge:
                self._merge(pair, pair.source_name)
            for pair in opened:
                self._link(pair)
                self._finish_killed_run(pair)

    def relink(self, pairs: Collection[MovePair]) -> None:
        """Make missing links to folders that are complete at their targets.

        All links have one act in the journal, and each parent folder is synced once.
        """
        if not pairs:
            return
        by_parent: dict[Path, list[MovePair]] = {}
        for pair in pairs:
            by_parent.setdefault(pair.source.parent, []).append(pair)
        for parent in sorted(by_parent):
            make_folders(parent, self.journal)
        sources, targets = tuple(pair.source for pair in pairs), tuple(pair.target for pair in pairs)
        self.journal.record(acts.LinkBatch(sources, targets))
        for parent, children in sorted(by_parent.items()):
            with OpenDir.at(parent) as folder:
                for pair in children:
                    folder.symlink(pair.source.name, str(pair.target))
                folder.sync()

    def _remove_prepared_links(self, pair: OpenPair) -> None:
        """Remove links that a killed run made under a temporary name and did not rename to their final name."""
        if pair.source_parent.readlink(pair.aside_name) == str(pair.paths.target):
            pair.source_parent.unlink(pair.aside_name)
        if pair.target_parent.readlink(pair.target_name) == str(pair.paths.target):
            pair.target_parent.unlink(pair.target_name)

    def _check(self, real: Sequence[OpenPair]) -> None:
        folders = [pair.source_parent.path / pair.source_name for pair in real]
        for pair, folder in zip(real, folders, strict=True):
            if self.kept.modes or self.target.modes is False:
                preflight.require_safe_parent(pair.source_parent)  # skipped if the home's modes are fixed
            preflight.require_no_mount(folder)
            if pair.target_parent.path.is_relative_to(folder):
                raise BlockedError(f"{pair.paths.target} lies inside {folder}. Choose another root: --root DIR")
        if folders:
            preflight.require_unused(folders)
        for pair in real:
            if pair.target_is_filled:
                self._require_no_conflict(pair, pair.source_name)

    def _require_no_conflict(self, pair: OpenPair, name: str) -> None:
        with pair.source_parent.enter(name) as original, pair.target_parent.enter(pair.target_name) as target:
            if conflict := whole_folders.conflict(original, target, self._kept([pair])):
                raise BlockedError(conflict)

    def _try_rename(self, pair: OpenPair) -> bool:
        """Move by a rename if both parents are on one file system; return False if a rename is not possible."""
        status = pair.source_parent.lstat(pair.source_name)
        if status is None or status.st_dev != _device(pair.target_parent):
            return False
        self.journal.record(acts.FolderRename(*pair.ends, whole=pair.paths.source))
        tree.remove_empty(pair.target_parent, pair.target_name)
        return self._exchange_with_link(pair, pair.target_parent, pair.target_name)

    def _exchange_with_link(self, pair: OpenPair, folder: OpenDir, name: str) -> bool:
        """Rename the source folder, and make the link at its old path; return False if the rename fails with EXDEV."""
        # The link is made under the new name first, so that one exchange sets both names at the same instant.
        folder.symlink(name, str(pair.paths.target))
        try:
            pair.source_parent.exchange(pair.source_name, folder, name)
        except OSError as error:
            folder.unlink(name)
            if error.errno not in _NO_EXCHANGE | {errno.EXDEV}:
                raise
            try:
                pair.source_parent.rename(pair.source_name, folder, name)
            except OSError as rename_error:
                if rename_error.errno == errno.EXDEV:  # a folder of an image layer under overlayfs, or a bind mount
                    return False
                raise
            self._link(pair)
        pair.source_parent.sync()
        folder.sync()
        self._require_link_works(pair)
        return True

    def _copy(self, pairs: Sequence[OpenPair]) -> None:
        """Copy all folders and verify the copies; then rename each copy to its target, and make the links."""
        with contextlib.ExitStack() as stack:
            folders = []
            total, copied = tree.TreeSize(), tree.TreeSize()
            for pair in pairs:
                source = stack.enter_context(pair.source_parent.enter(pair.source_name))
                size = tree.measure(source)
                self._require_storable(size, pair)
                foreign_writers.require_none(source)
                if pair.target_parent.lstat(pair.partial_name) is None:
                    self.journal.record(acts.FolderCopy(*pair.ends, pair.paths.partial, whole=pair.paths.source))
                partial = stack.enter_context(partial_folder(pair, has_owners=self.kept.owners))
                total += size
                copied += tree.measure(partial)
                folders.append((source, partial))
            preflight.require_space(total, copied, pairs[0].target_parent.path)
            totals = {"bytes": total.data, "files": total.files, "files proved": total.files}
            kept = self._kept(pairs)
            tree_copy = TreeCopy(folders, lambda count, unit: self.progress(count, totals[unit], unit), kept=kept)
            with _remove_partial_if_full(pairs):
                tree_copy.run()
            for pair in pairs:
                pair.target_parent.sync_file_system()  # the last comparison has set the modes of folders again
                self.journal.record(acts.CopyPlacement(*pair.ends, pair.paths.partial, whole=pair.paths.source))
                tree.remove_empty(pair.target_parent, pair.target_name)
                pair.target_parent.rename(pair.partial_name, pair.target_parent, pair.target_name)
                pair.target_parent.sync_file_system()
            self._swap_all(pairs, tree_copy, [source for source, _ in folders])

    def _require_storable(self, size: tree.TreeSize, pair: OpenPair) -> None:
        """Check that this user can move the tree, and that the target's file system can store the tree."""
        # If the targets keep owners, but `kept` does not, the file system of the originals sets one owner for all.
        preflight.require_movable(size, has_owners=self.kept.owners or self.target.owners is False)
        preflight.require_storable(size, self.target, pair.target_parent.path)

    def _kept(self, pairs: Sequence[OpenPair]) -> KeptMetadata:
        """Return the metadata that the copies keep; not the group if a parent folder has the set-group-ID bit."""
        parents = [parent for pair in pairs for parent in (pair.source_parent, pair.target_parent)]
        return replace(self.kept, group=not any(has_set_group_id(parent) for parent in parents))

    def _swap_all(self, pairs: Sequence[OpenPair], tree_copy: TreeCopy, originals: Sequence[OpenDir]) -> None:
        asides = [(pair, self._swap(pair)) for pair in pairs]
        preflight.require_unused([pair.source_parent.path / aside for pair, aside in asides])
        for original in originals:
            foreign_writers.require_none(original)
        changed = (
            tree_copy.original_has_changed()
        )  # a program may have written between the last comparison and the swap
        for pair, aside in asides:
            if changed:
                self._merge(pair, aside, is_copied=True)
            if pair.source_parent.readlink(aside) is None:
                self._remove_original(pair, aside)

    def _swap(self, pair: OpenPair) -> str:
        """Replace the original folder by the link, and return the present name of the original folder."""
        self.journal.record(acts.FolderSwap(*pair.ends, pair.paths.aside, whole=pair.paths.target))
        # A folder that cannot be renamed keeps its name, and `_remove_original` deletes it there.
        has_moved = self._exchange_with_link(pair, pair.source_parent, pair.aside_name)
        return pair.aside_name if has_moved else pair.source_name

    def _remove_original(self, pair: OpenPair, name: str) -> None:
        """Delete the original folder, which has the name `name` now; this is the last act of a move."""
        original = pair.paths.source.with_name(name)
        self.journal.record(acts.OriginalRemoval(*pair.ends, original, whole=pair.paths.target))
        tree.remove(pair.source_parent, name)
        pair.source_parent.sync()
        if name == pair.source_name:
            self._link(pair)
            self._require_link_works(pair)

    def _merge(self, pair: OpenPair, name: str, *, is_copied: bool = False) -> None:
        """Merge the folder `name` into the target; if it is the source folder, replace it by the link.

        Args:
            pair: the open parent folders.
            name: the name of the source folder, or of the folder beside it that an earlier swap has renamed.
            is_copied: this run has made the target as a copy of the folder, so whole folders of the same name in both
                are the same.
        """
        whole = pair.source_parent.path / name
        with pair.source_parent.enter(name) as original, pair.target_parent.enter(pair.target_name) as target:
            size = tree.measure(original)
            self._require_storable(size, pair)
            foreign_writers.require_none(original)
            self.journal.record(acts.MergeCopy(*pair.ends, pair.paths.partial, whole=whole))
            with partial_folder(pair, has_owners=self.kept.owners) as stage:
                totals = {"files compared": size.files}
                merge = whole_folders.merge(
                    original,
                    target,
                    stage,
                    lambda n, unit: self.progress(n, totals.get(unit, 0), unit),
                    self._kept([pair]),
                    is_copied=is_copied,
                )
                entries = merge.compare()
                # If a killed run left the original, and the target has all its entries, undo has nothing to separate.
                if name == pair.source_name or not all(merge.is_placed(entry) for entry in entries):
                    entries = self._place_merged(pair, whole, merge, entries)
            tree.remove(pair.target_parent, pair.partial_name)
            self._report(pair.paths, merge, entries)
            if name != pair.source_name:
                return
            aside = self._swap(pair)
            preflight.require_unused([pair.source_parent.path / aside])
            foreign_writers.require_none(original)
            changed = merge.original_has_changed()
        if changed and aside == pair.source_name:
            raise BlockedError(f"{whole} changed during its merge. Stop the program that writes to it, then run again.")
        if changed:
            self._merge(pair, aside)
        self._remove_original(pair, aside)

    def _report(self, paths: MovePair, merge: TreeMerge, entries: Sequence[MergeEntry]) -> None:
        others = [entry.other for entry in entries if entry.other and entry.action != "same"]
        self.conflicts += [str(paths.target / other) for other in others if other not in merge.kept_whole]
        self.kept_whole += [
            whole_folders.note(kind, paths.target / other, paths.source / path)
            for other, (path, kind) in merge.kept_whole.items()
        ]

    def _place_merged(
        self, pair: OpenPair, whole: Path, merge: TreeMerge, entries: list[MergeEntry]
    ) -> list[MergeEntry]:
        """Copy the entries and give them their names; return the entries as they were placed."""
        for _ in range(_ROUNDS):
            with _remove_partial_if_full([pair]):
                merge.copy_to_stage(entries)
            if not merge.target_has_changed(entries):
                break
            entries = merge.compare()
        else:
            raise BlockedError(
                f"{pair.paths.target} keeps changing. End the program that writes there, then run again."
            )
        manifest = merge_manifest.write(self.journal.backup, entries)
        self.journal.record(acts.FolderMerge(*pair.ends, manifest, whole=whole))
        merge.move_to_target(entries)
        return entries

    def _link(self, pair: OpenPair) -> None:
        """Make a link to the target at the old path; if the target is missing, make an empty folder there."""
        target = str(pair.paths.target)
        present = pair.source_parent.readlink(pair.source_name)
        if pair.target_parent.lstat(pair.target_name) is None:
            self.journal.record(acts.TargetCreation(*pair.ends, path=pair.paths.target))
            pair.target_parent.make(pair.target_name, 0o777)  # without the umask's bits: others may read a shared cache
        if present == target:
            return
        self.journal.record(acts.MoveLink(*pair.ends, path=pair.paths.source, was=present))
        if present is not None:
            # A rename replaces the old link by the new one atomically.
            temporary = beside(pair.paths.source, "link").name
            if pair.source_parent.lstat(temporary) is not None:
                pair.source_parent.unlink(temporary)
            pair.source_parent.symlink(temporary, target)
            pair.source_parent.rename(temporary, pair.source_parent, pair.source_name)
        else:
            pair.source_parent.symlink(pair.source_name, target)
        pair.source_parent.sync()

    def _finish_killed_run(self, pair: OpenPair) -> None:
        """Merge the original folder that a killed run left, and delete it and the unfinished copy.

        The original is merged because a program may have changed it since.
        """
        if pair.source_parent.lstat(pair.aside_name) is not None:
            preflight.require_unused([pair.source_parent.path / pair.aside_name])
            self._require_no_conflict(pair, pair.aside_name)
            self._merge(pair, pair.aside_name)
            self._remove_original(pair, pair.aside_name)
        if pair.target_parent.lstat(pair.partial_name) is not None:
            tree.remove(pair.target_parent, pair.partial_name)

    def _require_link_works(self, pair: OpenPair) -> None:
        """Check that the old path leads to the target folder, and that the folder can be listed through it."""
        source, target = pair.ends
        linked, status = source.stat(), pair.target_parent.lstat(pair.target_name)
        if status is None or (linked.st_dev, linked.st_ino) != (status.st_dev, status.st_ino):
            raise FirstlightError(f"{source} does not lead to {target}. Look at both paths: ls -ld {source} {target}")
        next(source.iterdir(), None)


@contextlib.contextmanager
def _remove_partial_if_full(pairs: Sequence[OpenPair]) -> Iterator[None]:
    """Delete the unfinished copies if the disk becomes full in a `with` block, since that also stops other programs."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            for pair in pairs:
                tree.remove(pair.target_parent, pair.partial_name)
        raise


def _device(folder: OpenDir) -> int:
    return (folder.path.stat() if folder.descriptor is None else os.fstat(folder.descriptor)).st_dev
