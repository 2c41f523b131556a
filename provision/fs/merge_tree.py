"""Merges one folder into another and discards no version of a file: the correct or newest version keeps the name.

A whole folder that differs from the target's folder of the same name gets a new name beside that folder.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from provision.core import hashing
from provision.fs import copy_file, database_files, merge_target, tree
from provision.fs.copy_tree import TreeCopy, marks
from provision.fs.kept_metadata import ALL_KEPT
from provision.fs.merge_names import base_name, displaced_name, free_name, parents_of, sibling, with_suffix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from provision.fs.kept_metadata import KeptMetadata
    from provision.fs.open_dir import OpenDir

_NOT_PLACED = {"same", "within"}
_FROM = ".firstlight-from-"  # joins the name of a whole folder with the name of the host from which the folder comes


@dataclass(frozen=True)
class MergeEntry:
    """Describe one entry of the original folder of a merge, and the action for it. A folder precedes its entries.

    `path` is relative to the merged folder. `kind` is "file", "folder", "link" or "special". `action` is one of:
    "same": the target has an equal entry, at the path `other` if that is set.
    "added": the target has no entry of this path.
    "within": the entry lies in an added folder.
    "newer": the entry takes the path, because it is newer or is a blob with the right hash. The target's version moves
    to the path `other`.
    "older": the entry is placed at the path `other`; a folder with all its entries.
    `mode`, `size` and `mtime_ns` are those of the entry. `twin` is the path of an earlier entry that is a hard link to
    the same file, or None.
    """

    path: str
    kind: str
    action: str
    other: str | None
    mode: int
    size: int
    mtime_ns: int
    twin: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the entry as JSON types."""
        return asdict(self)

    @property
    def kept_at(self) -> str:
        """Return the path of this entry in the target after the merge."""
        return (self.other or self.path) if self.action in {"older", "same"} else self.path


class TreeMerge:
    """Merges the folder `original` into the folder `target`; copies are first made in the empty folder `stage`.

    `stage` lies on the target's file system. `kept_whole` lists the whole folders that got a new name, as {new path in
    the target: (path in the original, kind)}.
    """

    def __init__(
        self,
        original: OpenDir,
        target: OpenDir,
        stage: OpenDir,
        progress: Callable[[int, str], None] | None = None,
        kind_of: Callable[[OpenDir], str | None] | None = None,
        origin: str = "",
        kept: KeptMetadata = ALL_KEPT,
    ) -> None:
        """Take the open folders and the callbacks.

        Args:
            original: the folder that is merged.
            target: the folder that receives the entries of the original.
            stage: an empty folder for the copies, on the target's file system.
            progress: called with (count since the last call, unit); the unit is "files compared", or one of TreeCopy.
            kind_of: returns the kind of a whole folder, such as "git repository", and None for any other folder;
                default: no folder is a whole folder.
            origin: the last part of the new name of a whole folder, such as the name of the host.
            kept: the metadata that both file systems keep.
        """
        self.kept = kept
        self.kind_of = kind_of or (lambda _: None)
        self.origin = origin
        self.kept_whole: dict[str, tuple[str, str]] = {}
        self.progress = progress or (lambda _, __: None)
        self.original = original
        self.target = target
        self.stage = stage
        self._block = (bytearray(copy_file.BLOCK), bytearray(copy_file.BLOCK))
        self._marks: dict[str, object] = {}
        self._target_marks: dict[str, merge_target.Mark | None] = {}
        self._first: dict[int, str] = {}

    def compare(self) -> list[MergeEntry]:
        """Return each entry of the original with its action. Files of the same path are compared byte by byte."""
        self._marks = dict(marks(self.original))
        self._first.clear()
        self.kept_whole.clear()
        rows = list(self._compare(self.original, self.target, ""))
        self._target_marks = self._marks_in_target(rows)
        # Another host may have made an entry after the comparison.
        self._target_marks |= {row.path: None for row in rows if row.action == "added"}
        return rows

    def target_has_changed(self, rows: Sequence[MergeEntry]) -> bool:
        """Return whether the target has other entries than at the call of `compare`, at the names that `rows` take."""
        return self._marks_in_target(rows) != self._target_marks

    def is_contained(self) -> bool:
        """Return whether the target has an equal entry for each entry of the original."""
        return all(row.action == "same" for row in self._compare(self.original, self.target, ""))

    def copy_to_stage(self, rows: Sequence[MergeEntry]) -> None:
        """Copy the entries that the target does not have to the stage, and verify the copies."""
        needed = {row.path for row in rows if row.action not in _NOT_PLACED}
        parents = {parent for path in needed for parent in parents_of(path)}

        def is_selected(path: str) -> bool:
            return path in parents or path in needed or any(parent in needed for parent in parents_of(path))

        TreeCopy([(self.original, self.stage)], self.progress, is_selected, self.kept).run()
        self.stage.sync_file_system()

    def move_to_target(self, rows: Sequence[MergeEntry]) -> None:
        """Rename the entries on the stage into the target, so that both versions of a file have a name at every time.

        An older version is on the disk under its other name before its own name is taken.

        Raises:
            BlockedError: another host has made an entry of that name meanwhile.
        """
        newer = [row for row in rows if row.action == "newer"]
        for row in newer:
            with open_parent(self.target, row.path) as (target, name):
                merge_target.move_aside(target, name, base_name(row.other), link=row.kind != "folder")
        if newer:
            self.target.sync_file_system()
        for row in rows:
            if row.action in _NOT_PLACED:
                continue
            with open_parent(self.stage, row.path) as (stage, name), open_parent(self.target, row.path) as (target, _):
                if row.action == "newer":
                    stage.rename(name, target, name)
                elif row.action == "older" and row.kind != "folder":
                    stage.rename(name, target, base_name(row.other))  # the name has the hash of the content
                else:
                    merge_target.place_new(stage, name, target, base_name(row.kept_at))
        self.target.sync_file_system()

    def is_placed(self, row: MergeEntry) -> bool:
        """Return whether the target already has an entry, at its own path or at the path `other` of an earlier run."""
        if row.action != "older" or row.kind == "folder":
            return row.action == "same"
        with (
            open_parent(self.original, row.path) as (original, name),
            open_parent(self.target, row.path) as (target, _),
        ):
            status, existing = original.lstat(name), target.lstat(base_name(row.other))
            return (
                status is not None
                and existing is not None
                and self._is_same(original, target, name, status, existing, base_name(row.other))
            )

    def original_has_changed(self) -> bool:
        """Return whether the original has changed since the call of `compare`."""
        return dict(marks(self.original)) != self._marks

    def _marks_in_target(self, rows: Sequence[MergeEntry]) -> dict[str, merge_target.Mark | None]:
        found: dict[str, merge_target.Mark | None] = {}
        for row in rows:
            if row.action not in _NOT_PLACED:
                found[row.path] = None
                with contextlib.suppress(OSError), open_parent(self.target, row.path) as (folder, name):
                    found[row.path] = merge_target.mark(folder.lstat(name))
        return found

    def _compare(self, original: OpenDir, target: OpenDir, key: str, at: str | None = None) -> Iterator[MergeEntry]:
        """Yield the entries of an open folder of the original and of the folders in it, with their actions.

        Args:
            original: the open folder of the original.
            target: the open folder of the target that corresponds to it.
            key: the path of the folder, relative to the top of the original.
            at: the path of the target's folder, if it differs from `key`.
        """
        databases = database_files.actions(
            original, target, lambda name, *both: self._is_same(original, target, name, *both)
        )
        for entry in sorted(original.scan(), key=lambda item: item.name):
            status, existing = entry.stat(follow_symlinks=False), target.lstat(entry.name)
            path = f"{key}/{entry.name}".removeprefix("/")
            is_folder = stat.S_ISDIR(status.st_mode)
            equal = None if at is None else f"{at}/{entry.name}"
            self.progress(not is_folder, "files compared")

            def row(
                action: str, other: str | None = None, *, path: str = path, status: os.stat_result = status
            ) -> MergeEntry:
                return self._row(path, status, action, sibling(path, other) if other else None)

            if existing is None or entry.name in databases:
                yield row(*databases.get(entry.name, ("added", None)))
                if is_folder:
                    with original.enter(entry.name) as inner:
                        yield from self._entries_inside(inner, path)
            elif is_folder and stat.S_ISDIR(existing.st_mode):
                with original.enter(entry.name) as first, target.enter(entry.name) as second:
                    kind = self._kind_of(first, second)
                    if kind is None:
                        yield self._row(path, status, "same", equal)
                        yield from self._compare(first, second, path, equal)
                    else:
                        yield from self._whole_folder_entries(
                            first, target, entry.name, self._row(path, status, "same", equal), kind
                        )
            elif self._is_same(original, target, entry.name, status, existing):
                yield self._row(path, status, "same", equal)
            elif self._takes_name(path, status, existing, original, target):
                yield row("newer", displaced_name(target, entry.name, existing))
            elif is_folder:
                other = displaced_name(original, entry.name, status)
                with original.enter(entry.name) as first:
                    yield from self._entries_beside(first, target, [other], row("older", free_name(target, other)))
            else:
                yield row("older", displaced_name(original, entry.name, status))

    def _kind_of(self, first: OpenDir, second: OpenDir) -> str | None:
        """Return the kind of two folders of the same name if one is a whole folder; None if not, or if one is empty."""
        kind = self.kind_of(first) or self.kind_of(second)
        return None if kind is None or tree.is_empty(first) or tree.is_empty(second) else kind

    def _whole_folder_entries(
        self, original: OpenDir, target: OpenDir, name: str, same: MergeEntry, kind: str
    ) -> Iterator[MergeEntry]:
        """Yield the entries of a whole folder whose name the target also has.

        If the target has an equal folder, these are all its entries with the action "same". Else it is one entry with
        the action "older" and the folder's new path.

        Args:
            original: the open whole folder.
            target: the open folder of the target that has a folder of the same name.
            name: the name of both folders.
            same: the entry of the folder itself, with the action "same".
            kind: the kind of the whole folder.
        """
        with target.enter(name) as there:
            rows = self._equal_entries(original, there, same)
        if rows is None:
            fresh = with_suffix(name, f"{_FROM}{self.origin}")
            kept = sorted(entry.name for entry in target.scan() if entry.name.startswith(f"{name}{_FROM}"))
            place = replace(same, action="older", other=sibling(same.path, free_name(target, fresh)))
            rows = list(self._entries_beside(original, target, dict.fromkeys([fresh, *kept]), place))
            self.kept_whole[rows[0].kept_at] = (same.path, kind)
        yield from rows

    def _entries_beside(
        self, original: OpenDir, target: OpenDir, names: Iterable[str], place: MergeEntry
    ) -> Iterator[MergeEntry]:
        """Yield the entries of a folder with the action "same" if an interrupted run has placed it; else yield `place`.

        Args:
            original: the open folder.
            target: the open folder of the target in which the folder gets a new name.
            names: the names that an interrupted run may have given to the folder.
            place: the entry with the action "older" and the new path of the folder.
        """
        for name in names:
            status = target.lstat(name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                with target.enter(name) as there:
                    same = replace(place, action="same", other=sibling(place.path, name))
                    rows = self._equal_entries(original, there, same)
                if rows is not None:
                    yield from rows
                    return
        yield place

    def _equal_entries(self, original: OpenDir, there: OpenDir, same: MergeEntry) -> list[MergeEntry] | None:
        """Return the entries of a folder, with the action "same", if the folder `there` has an equal entry for each.

        The first is `same`, the entry of the folder itself. If an entry has no equal, the result is None.
        """
        first, rows = dict(self._first), [same]
        for row in self._compare(original, there, same.path, same.other):
            if row.action != "same":
                self._first = first
                return None
            rows.append(row)
        return rows

    def _takes_name(
        self, path: str, status: os.stat_result, existing: os.stat_result, original: OpenDir, target: OpenDir
    ) -> bool:
        """Return whether an entry takes the name of the target's entry.

        If both are blobs of a hub cache, and only one has the hash that the name states, that blob has the name. So a
        damaged blob never replaces a good one. Any other entry takes the name if it is newer.
        """
        stated = hashing.named_hash(path)
        if stated is not None and stat.S_ISREG(status.st_mode) and stat.S_ISREG(existing.st_mode):
            name = base_name(path)
            is_right, is_existing_right = (_has_hash(folder, name, stated) for folder in (original, target))
            if is_right != is_existing_right:
                return is_right
        times = status.st_mtime_ns, existing.st_mtime_ns
        return times[0] > times[1] and not self.kept.is_same_time(*times)

    def _row(self, path: str, status: os.stat_result, action: str, other: str | None) -> MergeEntry:
        twin = None
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            first = self._first.setdefault(status.st_ino, path)
            twin = first if first != path else None
        mode = stat.S_IMODE(status.st_mode)
        return MergeEntry(path, _kind(status), action, other, mode, status.st_size, status.st_mtime_ns, twin)

    def _entries_inside(self, folder: OpenDir, key: str) -> Iterator[MergeEntry]:
        for entry in sorted(folder.scan(), key=lambda item: item.name):
            status = entry.stat(follow_symlinks=False)
            yield self._row(f"{key}/{entry.name}", status, "within", None)
            if stat.S_ISDIR(status.st_mode):
                with folder.enter(entry.name) as inner:
                    yield from self._entries_inside(inner, f"{key}/{entry.name}")

    def _is_same(
        self,
        original: OpenDir,
        target: OpenDir,
        name: str,
        status: os.stat_result,
        existing: os.stat_result,
        other: str | None = None,
    ) -> bool:
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(existing.st_mode):
            return False
        if not stat.S_ISREG(status.st_mode):
            return original.readlink(name) == target.readlink(other or name)
        if status.st_size != existing.st_size:
            return False
        first = original.open(name, os.O_RDONLY)
        try:
            second = target.open(other or name, os.O_RDONLY)
            try:
                return copy_file.is_same(first, second, self._block, content_only=True)
            finally:
                os.close(second)
        finally:
            os.close(first)


def _has_hash(folder: OpenDir, name: str, stated: tuple[str, str]) -> bool:
    """Return whether the content of a file has the hash `stated`, which is (kind, hash in hexadecimal)."""
    kind, expected = stated
    with os.fdopen(folder.open(name, os.O_RDONLY), "rb") as file:
        digest = hashing.content_hash(kind, os.fstat(file.fileno()).st_size)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == expected


@contextlib.contextmanager
def open_parent(top: OpenDir, path: str) -> Iterator[tuple[OpenDir, str]]:
    """Open the parent folder of a relative path during a `with` block; yield (open folder, last part of the path)."""
    *parts, name = path.split("/")
    with contextlib.ExitStack() as stack:
        here = top
        for part in parts:
            here = stack.enter_context(here.enter(part))
        yield here, name


def _kind(status: os.stat_result) -> str:
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    return "file" if stat.S_ISREG(status.st_mode) else "link" if stat.S_ISLNK(status.st_mode) else "special"
