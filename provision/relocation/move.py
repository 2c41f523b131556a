"""Moves folders and leaves links: at every instant a complete copy is under one name, and the journal says which."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, FirstlightError
from provision.core.progress import no_progress
from provision.fs import durable, tree
from provision.fs.copy_tree import TreeCopy
from provision.fs.merge_tree import TreeMerge
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import preflight
from provision.volume import journal_acts as acts
from provision.volume.changes import make_folders

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from provision.core.progress import Progress
    from provision.fs.merge_tree import MergeEntry
    from provision.volume.journal import Journal

# The file system, or the system, knows no exchange; a rename may still do.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class MovePair:
    """A folder's old path, which becomes a link, and its new place."""

    source: Path
    target: Path

    @property
    def aside(self) -> Path:
        """Where the folder itself waits, once the link has its name, until it is dropped."""
        return _beside(self.source, "aside")

    @property
    def partial(self) -> Path:
        """Where the copy grows before it gets the target's name."""
        return _beside(self.target, "partial")

    @property
    def unfinished(self) -> bool:
        """Whether the link stands and a killed run has left something to tidy."""
        return os.path.lexists(self.aside) or os.path.lexists(self.partial)

    @property
    def is_wiped(self) -> bool:
        """Whether nothing but the link is gone."""
        return not os.path.lexists(self.source) and self.target.is_dir() and not self.unfinished


class _OpenPair:
    """A pair with the folders that hold its two names."""

    def __init__(self, pair: MovePair, home: OpenDir, there: OpenDir) -> None:
        self.pair = pair
        self.home, self.name = home, pair.source.name
        self.there, self.new = there, pair.target.name
        self.aside, self.partial = pair.aside.name, pair.partial.name

    @property
    def ends(self) -> tuple[Path, Path]:
        return self.pair.source, self.pair.target

    @property
    def source_is_real(self) -> bool:
        found = self.home.lstat(self.name)
        return found is not None and stat.S_ISDIR(found.st_mode) and self.home.readlink(self.name) is None

    @property
    def target_is_filled(self) -> bool:
        found = self.there.lstat(self.new)
        if found is None or not stat.S_ISDIR(found.st_mode):
            return False
        with self.there.enter(self.new) as target:
            return not tree.is_empty(target)


class FolderMove:
    """Moves the folders of one label together: a file with names in several of them stays one file."""

    def __init__(self, journal: Journal, progress: Progress = no_progress) -> None:
        """Take the journal, which records every act before it is done, and the progress callback."""
        self.journal = journal
        self.progress = progress
        self.conflicts: list[str] = []

    def run(self, pairs: Sequence[MovePair]) -> None:
        """Move what is there, merge where both are, finish what a killed run left; every source ends as a link.

        Raises:
            BlockedError: somebody uses the folder, it is not ours, there is no room, something is mounted in it.
            FirstlightError: a copy does not come out right.
            OSError: what the system says; nothing is lost, and the next run goes on.
        """
        together = [pair for pair in pairs if link_target(pair.source) is None and pair.source.is_dir()]
        for pair in pairs:
            if pair not in together:
                self._run([pair])  # a thousand of them would need as many open folders
        self._run(together)

    def _run(self, pairs: Sequence[MovePair]) -> None:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(_opened(pair, self.journal)) for pair in pairs]
            for each in opened:
                self._tidy(each)
            real = [each for each in opened if each.source_is_real]
            self._check(real)
            both = [each for each in real if each.target_is_filled]
            rest = [each for each in real if each not in both and not self._renamed(each)]
            if rest:
                self._copy(rest)
            for each in both:
                self._merge(each, each.name)
            for each in opened:
                self._link(each)
                self._drop_left(each)

    def relink(self, pairs: Collection[MovePair]) -> None:
        """Make the links of folders that are in their new place: one record and one force to the disk for them all."""
        if not pairs:
            return
        parents: dict[Path, list[MovePair]] = {}
        for pair in pairs:
            parents.setdefault(pair.source.parent, []).append(pair)
        for parent in sorted(parents):
            make_folders(parent, self.journal)
        sources, targets = tuple(pair.source for pair in pairs), tuple(pair.target for pair in pairs)
        self.journal.record(acts.LinkBatch(sources, targets))
        for parent, inside in sorted(parents.items()):
            with OpenDir.at(parent) as home:
                for pair in inside:
                    home.symlink(pair.source.name, str(pair.target))
                home.sync()

    def _tidy(self, each: _OpenPair) -> None:
        """Take away links that a killed run had prepared, and that never got their name."""
        if each.home.readlink(each.aside) == str(each.pair.target):
            each.home.unlink(each.aside)
        if each.there.readlink(each.new) == str(each.pair.target):
            each.there.unlink(each.new)

    def _check(self, real: Sequence[_OpenPair]) -> None:
        folders = [each.home.path / each.name for each in real]
        for each, folder in zip(real, folders, strict=True):
            preflight.require_safe_parent(each.home)
            preflight.require_no_mount(folder)
            if each.there.path.is_relative_to(folder):
                raise BlockedError(f"{each.pair.target} lies inside {folder}, which is to be moved there.")
        if folders:
            preflight.require_unused(folders)

    def _renamed(self, each: _OpenPair) -> bool:
        """Move by a rename where both places are on one file system, and it lets us."""
        found = each.home.lstat(each.name)
        if found is None or found.st_dev != _device(each.there):
            return False
        self.journal.record(acts.FolderRename(*each.ends, whole=each.pair.source))
        _remove_empty(each.there, each.new)
        return self._change_places(each, each.there, each.new)

    def _change_places(self, each: _OpenPair, folder: OpenDir, name: str) -> bool:
        """Let the old path be the link, and the folder have another name; False where it cannot get one (EXDEV)."""
        # The link lies prepared under the other name: one exchange then does both, and no moment is without either.
        folder.symlink(name, str(each.pair.target))
        try:
            each.home.exchange(each.name, folder, name)
        except OSError as error:
            folder.unlink(name)
            if error.errno not in _NO_EXCHANGE | {errno.EXDEV}:
                raise
            try:
                each.home.rename(each.name, folder, name)
            except OSError as refused:
                if refused.errno == errno.EXDEV:  # overlayfs, for a folder of an image's layer; a bind mount
                    return False
                raise
            self._link(each)
        each.home.sync()
        folder.sync()
        self._use(each)
        return True

    def _copy(self, rest: Sequence[_OpenPair]) -> None:
        """Copy together, prove, then swap each: the copy gets its name, the link gets the old path."""
        with contextlib.ExitStack() as stack:
            folders = []
            wanted, there = tree.TreeSize(), tree.TreeSize()
            for each in rest:
                source = stack.enter_context(each.home.enter(each.name))
                amount = tree.measure(source)
                preflight.require_movable(amount)
                if each.there.lstat(each.partial) is None:
                    self.journal.record(acts.FolderCopy(*each.ends, each.pair.partial, whole=each.pair.source))
                partial = stack.enter_context(_staging(each))
                wanted += amount
                there += tree.measure(partial)
                folders.append((source, partial))
            preflight.require_space(wanted, there, rest[0].there.path)
            totals = {"bytes": wanted.data, "files": wanted.files, "files proved": wanted.files}
            mirror = TreeCopy(folders, lambda count, unit: self.progress(count, totals[unit], unit))
            with _nothing_left_on_a_full_disk(rest):
                mirror.run()
            for each in rest:
                each.there.sync_file_system()  # the last look has set the modes of folders anew
                self.journal.record(acts.CopyPlacement(*each.ends, each.pair.partial, whole=each.pair.source))
                _remove_empty(each.there, each.new)
                each.there.rename(each.partial, each.there, each.new)
                each.there.sync_file_system()
            self._swap_all(rest, mirror)

    def _swap_all(self, rest: Sequence[_OpenPair], mirror: TreeCopy) -> None:
        asides = [(each, self._swap(each)) for each in rest]
        preflight.require_unused([each.home.path / aside for each, aside in asides])
        changed = mirror.changed_since()  # between the last look and the swap
        for each, aside in asides:
            if changed:
                self._merge(each, aside)
            if each.home.readlink(aside) is None:
                self._drop(each, aside)

    def _swap(self, each: _OpenPair) -> str:
        """Let the old path be a link, use it once, and return the name under which the folder waits."""
        self.journal.record(acts.FolderSwap(*each.ends, each.pair.aside, whole=each.pair.target))
        # What cannot get another name is emptied where it is.
        return each.aside if self._change_places(each, each.home, each.aside) else each.name

    def _drop(self, each: _OpenPair, aside: str) -> None:
        """Take the old folder away, the last act of a move."""
        self.journal.record(acts.OriginalRemoval(*each.ends, each.pair.source.with_name(aside), whole=each.pair.target))
        tree.remove(each.home, aside)
        each.home.sync()
        if aside == each.name:
            self._link(each)
            self._use(each)

    def _merge(self, each: _OpenPair, name: str) -> None:
        """Put the folder under `name` (the old path, or aside) into the target, then let the old path be the link."""
        with (
            each.home.enter(name) as original,
            each.there.enter(each.new) as target,
        ):
            amount = tree.measure(original)
            preflight.require_movable(amount)
            self.journal.record(acts.MergeCopy(*each.ends, each.pair.partial, whole=each.home.path / name))
            with _staging(each) as stage:
                totals = {"files compared": amount.files}
                merge = TreeMerge(original, target, stage, lambda n, unit: self.progress(n, totals.get(unit, 0), unit))
                rows = merge.look()
                # What waited aside and is all in the target leaves nothing for undo to part.
                if name == each.name or not all(merge.is_placed(row) for row in rows):
                    self._bring(each, name, merge, rows)
            tree.remove(each.there, each.partial)
            self.conflicts += [str(each.pair.target / row.other) for row in rows if row.other]
            if name != each.name:
                return
            aside = self._swap(each)
            preflight.require_unused([each.home.path / aside])
            changed = merge.changed_since()
        if changed and aside == each.name:
            raise BlockedError(f"{each.pair.source} was written to meanwhile. End what writes there, then run again.")
        if changed:
            self._merge(each, aside)
        self._drop(each, aside)

    def _bring(self, each: _OpenPair, name: str, merge: TreeMerge, rows: list[MergeEntry]) -> None:
        with _nothing_left_on_a_full_disk([each]):
            merge.bring(rows)
        manifest = self._manifest([row.to_dict() for row in rows])
        self.journal.record(acts.FolderMerge(*each.ends, manifest, whole=each.home.path / name))
        merge.place(rows)

    def _link(self, each: _OpenPair) -> None:
        """The old path is a link to the target, which is there."""
        target = str(each.pair.target)
        found = each.home.readlink(each.name)
        if each.there.lstat(each.new) is None:
            self.journal.record(acts.TargetCreation(*each.ends, path=each.pair.target))
            each.there.make(each.new)
        if found == target:
            return
        self.journal.record(acts.MoveLink(*each.ends, path=each.pair.source, was=found))
        if found is not None:
            # The new link takes the old one's name at once.
            spare = _beside(each.pair.source, "link").name
            if each.home.lstat(spare) is not None:
                each.home.unlink(spare)
            each.home.symlink(spare, target)
            each.home.rename(spare, each.home, each.name)
        else:
            each.home.symlink(each.name, target)
        each.home.sync()

    def _drop_left(self, each: _OpenPair) -> None:
        """Merge what a killed run left beside a link that stands: it may have been written to since."""
        if each.home.lstat(each.aside) is not None:
            preflight.require_unused([each.home.path / each.aside])
            self._merge(each, each.aside)
            self._drop(each, each.aside)
        if each.there.lstat(each.partial) is not None:
            tree.remove(each.there, each.partial)

    def _use(self, each: _OpenPair) -> None:
        """The old path leads to the new place, for any program that uses it now."""
        seen, meant = each.pair.source.stat(), each.there.lstat(each.new)
        if meant is None or (seen.st_dev, seen.st_ino) != (meant.st_dev, meant.st_ino):
            raise FirstlightError(
                f"{each.pair.source} does not lead to {each.pair.target}. Look at both: ls -ld {each.pair.source}"
            )
        next(each.pair.source.iterdir(), None)

    def _manifest(self, rows: list[dict[str, object]]) -> Path:
        """Keep what a merge does, so that undo can part it again."""
        folder = self.journal.backup
        durable.make_folders(folder)
        path = folder / f"merge-{sum(1 for _ in folder.iterdir())}.json"
        with path.open("x", encoding="ascii") as file:
            json.dump(rows, file)
            file.flush()
            os.fsync(file.fileno())
        durable.sync_folder(folder)
        return path


@contextlib.contextmanager
def _opened(pair: MovePair, journal: Journal) -> Iterator[_OpenPair]:
    make_folders(pair.target.parent, journal)
    make_folders(pair.source.parent, journal)
    with OpenDir.at(pair.source.parent) as home, OpenDir.at(pair.target.parent) as there:
        yield _OpenPair(pair, home, there)


def _staging(each: _OpenPair) -> OpenDir:
    """The folder in which a copy grows, made where it is not there; one that somebody else has made is refused."""
    if each.there.lstat(each.partial) is None:
        each.there.make(each.partial)
    stage = each.there.enter(each.partial)
    if stage.descriptor is not None and os.fstat(stage.descriptor).st_uid != os.geteuid():
        stage.close()
        raise BlockedError(f"{each.pair.partial} belongs to another user. Look at it: ls -ld {each.pair.partial}")
    return stage


@contextlib.contextmanager
def _nothing_left_on_a_full_disk(opened: Sequence[_OpenPair]) -> Iterator[None]:
    """A disk that is full to the brim harms others, so what was copied is taken away where there is no room."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            for each in opened:
                tree.remove(each.there, each.partial)
        raise


def _beside(path: Path, what: str) -> Path:
    """A name for our own use beside a path; a long one is shortened to what a file system takes."""
    suffix = f".firstlight-{what}"
    name = path.name
    if len(os.fsencode(name)) + len(suffix) + 1 > 255:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}{suffix}")


def _remove_empty(folder: OpenDir, name: str) -> None:
    """Take away an empty tree of folders under a name; where something has appeared in it, the system refuses."""
    found = folder.lstat(name)
    if found is None:
        return
    with folder.enter(name) as below:
        for entry in below.scan():
            _remove_empty(below, entry.name)
    folder.rmdir(name)


def _device(folder: OpenDir) -> int:
    return (folder.path.stat() if folder.descriptor is None else os.fstat(folder.descriptor)).st_dev
