"""Merges one folder into another: no version of a file is discarded, and the right or newest version keeps the name.

A folder whose files belong together is kept whole beside the target's folder of its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import stat
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from provision.core import hashing
from provision.fs import copy_file, tree
from provision.fs.copy_tree import CANNOT_LINK, TreeCopy, marks
from provision.fs.kept_metadata import ALL_KEPT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from provision.fs.kept_metadata import KeptMetadata
    from provision.fs.open_dir import OpenDir

_LONGEST_NAME = 255
_NOT_PLACED = {"same", "within"}
_FROM = ".firstlight-from-"  # between the name of a whole folder and the name of the host that it comes from


@dataclass(frozen=True)
class MergeEntry:
    """Describe one entry of the merged folder, and what happens to it. A folder comes before its entries.

    `action` is "same" (the target has an equal entry, at `other` if that is set), "added" (the target has none),
    "within" (the entry lies in an added folder), "newer" (the entry takes the name, because it is newer or is a blob
    with the right hash, and the target's version moves to `other`) or "older" (the entry is placed at `other`, a folder
    with all its entries). `mode`, `size` and `mtime_ns` are those of the entry. `twin` is the path of an earlier entry
    that is a hard link to the same file.
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
    """Merges `original` into `target` through `stage`, an empty folder on the target's file system.

    `kept_whole` is {path in the target: (path, kind)} of the whole folders that differ from the target's.
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
            target: the folder that receives its entries.
            stage: the empty folder for copies.
            progress: called with (count, unit): "files compared", or a unit of TreeCopy.
            kind_of: returns the kind of a folder that stays whole, None for any other folder; default: none does.
            origin: the end of the name of a whole folder beside the target's.
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
        self._first: dict[int, str] = {}

    def look(self) -> list[MergeEntry]:
        """Return the action for each entry of the original; files of one path are compared byte by byte."""
        self._marks = dict(marks(self.original))
        self._first.clear()
        return list(self._compare(self.original, self.target, ""))

    def is_held(self) -> bool:
        """Return whether the target holds an equal entry for each entry of the original."""
        return all(row.action == "same" for row in self._compare(self.original, self.target, ""))

    def bring(self, rows: Sequence[MergeEntry]) -> None:
        """Copy the entries that the target lacks to the stage, and verify the copies."""
        needed = {row.path for row in rows if row.action not in _NOT_PLACED}
        parents = {parent for path in needed for parent in _parents(path)}

        def is_selected(path: str) -> bool:
            return path in parents or path in needed or any(parent in needed for parent in _parents(path))

        TreeCopy([(self.original, self.stage)], self.progress, is_selected, self.kept).run()
        self.stage.sync_file_system()

    def place(self, rows: Sequence[MergeEntry]) -> None:
        """Rename the entries on the stage into the target; after each rename both versions still have a name.

        An older version is on the disk under its other name before its own name is taken.
        """
        newer = [row for row in rows if row.action == "newer"]
        for row in newer:
            with holding(self.target, row.path) as (target, name):
                _move_aside(target, name, _base(row.other), link=row.kind != "folder")
        if newer:
            self.target.sync_file_system()
        for row in rows:
            if row.action in _NOT_PLACED:
                continue
            with holding(self.stage, row.path) as (stage, name), holding(self.target, row.path) as (target, _):
                if row.action == "older":
                    stage.rename(name, target, _base(row.other))
                    continue
                stage.rename(name, target, name)
        self.target.sync_file_system()

    def is_placed(self, row: MergeEntry) -> bool:
        """Return whether the target holds an entry already, under its own name or as an earlier run has kept it."""
        if row.action != "older" or row.kind == "folder":
            return row.action == "same"
        with holding(self.original, row.path) as (original, name), holding(self.target, row.path) as (target, _):
            status, existing = original.lstat(name), target.lstat(_base(row.other))
            return (
                status is not None
                and existing is not None
                and self._is_same(original, target, name, status, existing, _base(row.other))
            )

    def changed_since(self) -> bool:
        """Return whether the original has changed since the call of `look`."""
        return dict(marks(self.original)) != self._marks

    def _compare(self, original: OpenDir, target: OpenDir, key: str, at: str | None = None) -> Iterator[MergeEntry]:
        """Yield the entries of a folder `key` of the original; `at` is the target's folder, if it has another path."""
        for entry in sorted(original.scan(), key=lambda item: item.name):
            status, existing = entry.stat(follow_symlinks=False), target.lstat(entry.name)
            path = f"{key}/{entry.name}".removeprefix("/")
            is_folder = stat.S_ISDIR(status.st_mode)
            equal = None if at is None else f"{at}/{entry.name}"
            self.progress(not is_folder, "files compared")

            def row(
                action: str, other: str | None = None, *, path: str = path, status: os.stat_result = status
            ) -> MergeEntry:
                return self._row(path, status, action, _sibling(path, other) if other else None)

            if existing is None:
                yield row("added")
                if is_folder:
                    with original.enter(entry.name) as inner:
                        yield from self._within(inner, path)
            elif is_folder and stat.S_ISDIR(existing.st_mode):
                with original.enter(entry.name) as first, target.enter(entry.name) as second:
                    kind = self._kind_of(first, second)
                    if kind is None:
                        yield self._row(path, status, "same", equal)
                        yield from self._compare(first, second, path, equal)
                    else:
                        yield from self._keep_whole(
                            first, target, entry.name, self._row(path, status, "same", equal), kind
                        )
            elif self._is_same(original, target, entry.name, status, existing):
                yield self._row(path, status, "same", equal)
            elif self._takes_name(path, status, existing, original, target):
                yield row("newer", _other_name(target, entry.name, existing))
            elif is_folder:
                other = _other_name(original, entry.name, status)
                with original.enter(entry.name) as first:
                    yield from self._beside(first, target, [other], row("older", _free_name(target, other)))
            else:
                yield row("older", _other_name(original, entry.name, status))

    def _kind_of(self, first: OpenDir, second: OpenDir) -> str | None:
        """Return the kind of two folders of one name if one of them is whole; None if one has no files."""
        kind = self.kind_of(first) or self.kind_of(second)
        return None if kind is None or tree.is_empty(first) or tree.is_empty(second) else kind

    def _keep_whole(
        self, original: OpenDir, target: OpenDir, name: str, same: MergeEntry, kind: str
    ) -> Iterator[MergeEntry]:
        """Yield the entries of a whole folder: those of an equal folder, else one for its place beside the target's.

        `same` is the entry of the folder itself if the target's folder `name` is equal.
        """
        with target.enter(name) as there:
            rows = self._held(original, there, same)
        if rows is None:
            fresh = _with_suffix(name, f"{_FROM}{self.origin}")
            kept = sorted(entry.name for entry in target.scan() if entry.name.startswith(f"{name}{_FROM}"))
            place = replace(same, action="older", other=_sibling(same.path, _free_name(target, fresh)))
            rows = list(self._beside(original, target, dict.fromkeys([fresh, *kept]), place))
            self.kept_whole[rows[0].kept_at] = (same.path, kind)
        yield from rows

    def _beside(
        self, original: OpenDir, target: OpenDir, names: Iterable[str], place: MergeEntry
    ) -> Iterator[MergeEntry]:
        """Yield the entries of the first folder among `names` that holds the original; without one, only `place`.

        An interrupted run may have placed the folder already.
        """
        for name in names:
            status = target.lstat(name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                with target.enter(name) as there:
                    rows = self._held(original, there, replace(place, action="same", other=_sibling(place.path, name)))
                if rows is not None:
                    yield from rows
                    return
        yield place

    def _held(self, original: OpenDir, there: OpenDir, same: MergeEntry) -> list[MergeEntry] | None:
        """Return the entries of a folder if `there` has an equal one for each; None if not."""
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
        """Return whether an entry takes the name: it has the hash that the name states, else it is newer.

        The name of a hub cache's blob is the hash of its content, so a damaged blob never takes it.
        """
        stated = hashing.named_hash(path)
        if stated is not None and stat.S_ISREG(status.st_mode) and stat.S_ISREG(existing.st_mode):
            name = _base(path)
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

    def _within(self, folder: OpenDir, key: str) -> Iterator[MergeEntry]:
        for entry in sorted(folder.scan(), key=lambda item: item.name):
            status = entry.stat(follow_symlinks=False)
            yield self._row(f"{key}/{entry.name}", status, "within", None)
            if stat.S_ISDIR(status.st_mode):
                with folder.enter(entry.name) as inner:
                    yield from self._within(inner, f"{key}/{entry.name}")

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
    """Return whether the content of a file has a hash, given as (kind, hash)."""
    kind, expected = stated
    with os.fdopen(folder.open(name, os.O_RDONLY), "rb") as file:
        digest = hashing.content_hash(kind, os.fstat(file.fileno()).st_size)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == expected


def _parents(path: str) -> Iterator[str]:
    """Yield the parent folders of a relative path, the nearest first."""
    while path := path.rpartition("/")[0]:
        yield path


def _move_aside(folder: OpenDir, name: str, other: str, *, link: bool) -> None:
    """Make a hard link `other` to an entry (`link`), or rename the entry to it, so that its name can be taken.

    A folder cannot take a name that a file still has, so its predecessor is renamed.
    """
    status = folder.lstat(name)
    if status is None:
        return
    kept = folder.lstat(other)
    if not link and kept is not None and (kept.st_dev, kept.st_ino) == (status.st_dev, status.st_ino):
        folder.unlink(name)  # a rename between two names of one file does nothing
        return
    if link and not stat.S_ISDIR(status.st_mode):
        try:
            if kept is None:
                folder.hardlink(name, folder, other)
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise
        else:
            return
    folder.rename(name, folder, other)


@contextlib.contextmanager
def holding(top: OpenDir, path: str) -> Iterator[tuple[OpenDir, str]]:
    """Open the parent folder of a relative path, and yield the folder and the last component of the path."""
    *parts, name = path.split("/")
    with contextlib.ExitStack() as stack:
        here = top
        for part in parts:
            here = stack.enter_context(here.enter(part))
        yield here, name


def _other_name(folder: OpenDir, name: str, status: os.stat_result) -> str:
    """Return the new name for an entry whose name another entry takes.

    The name contains a hash of the content, so a repeated merge returns the same name.
    """
    if stat.S_ISREG(status.st_mode):
        digest = hashlib.sha256()
        descriptor = folder.open(name, os.O_RDONLY)
        with os.fdopen(descriptor, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    elif stat.S_ISLNK(status.st_mode):
        digest = hashlib.sha256(os.fsencode(folder.readlink(name) or ""))
    else:
        digest = hashlib.sha256(f"{status.st_mode} {status.st_mtime_ns}".encode())
    return _with_suffix(name, f".firstlight-{digest.hexdigest()[:12]}")


def _with_suffix(name: str, suffix: str) -> str:
    """Return the name with a suffix; a name that becomes too long is cut."""
    encoded = os.fsencode(name)
    return os.fsdecode(encoded[: _LONGEST_NAME - len(os.fsencode(suffix))]) + suffix


def _free_name(folder: OpenDir, name: str) -> str:
    """Return the name, with a number if the folder has an entry of that name."""
    numbered = (_with_suffix(name, f"-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([name], numbered) if folder.lstat(candidate) is None)


def _sibling(path: str, name: str) -> str:
    """Return the relative path of the entry `name` in the folder that holds `path`."""
    return f"{path.rpartition('/')[0]}/{name}".removeprefix("/")


def _kind(status: os.stat_result) -> str:
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    return "file" if stat.S_ISREG(status.st_mode) else "link" if stat.S_ISLNK(status.st_mode) else "special"


def _base(path: str | None) -> str:
    return (path or "").rpartition("/")[2]
