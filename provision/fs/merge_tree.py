"""Merges one folder into another: no version of a file is discarded, and the newest version keeps the name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from provision.fs import copy_file
from provision.fs.copy_tree import CANNOT_LINK, TreeCopy, marks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from provision.fs.open_dir import OpenDir

_LONGEST_NAME = 255
_NOT_PLACED = {"same", "within"}


@dataclass(frozen=True)
class MergeEntry:
    """Describe one entry of the merged folder, and what happens to it. A folder comes before its entries.

    `action` is "same" (the target has an equal entry), "added" (the target has none), "within" (the entry lies in an
    added folder), "newer" (the entry takes the name, and the target's version moves to `other`) or "older" (the entry
    is placed at `other`). `mode`, `size` and `mtime_ns` are those of the entry. `twin` is the path of an earlier entry
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
        return (self.other or self.path) if self.action == "older" else self.path


class TreeMerge:
    """Merges `original` into `target` through `stage`, an empty folder on the target's file system."""

    def __init__(
        self, original: OpenDir, target: OpenDir, stage: OpenDir, progress: Callable[[int, str], None] | None = None
    ) -> None:
        """Take the open folders, and a callback for (count, unit): "files compared", or a unit of TreeCopy."""
        self.progress = progress or (lambda _, __: None)
        self.original = original
        self.target = target
        self.stage = stage
        self._block = (bytearray(copy_file.BLOCK), bytearray(copy_file.BLOCK))
        self._marks: dict[str, object] = {}
        self._first: dict[int, str] = {}

    def look(self) -> list[MergeEntry]:
        """Compare both folders, byte by byte where both have a name, and return an entry for each path."""
        self._marks = dict(marks(self.original))
        self._first.clear()
        return list(self._compare(self.original, self.target, ""))

    def bring(self, rows: Sequence[MergeEntry]) -> None:
        """Copy the entries that the target lacks to the stage, and verify the copies."""
        needed = {row.path for row in rows if row.action not in _NOT_PLACED}
        parents = {parent for path in needed for parent in _parents(path)}

        def is_selected(path: str) -> bool:
            return path in parents or path in needed or any(parent in needed for parent in _parents(path))

        TreeCopy([(self.original, self.stage)], self.progress, is_selected).run()
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

    def _compare(self, original: OpenDir, target: OpenDir, key: str) -> Iterator[MergeEntry]:
        for entry in sorted(original.scan(), key=lambda item: item.name):
            status, existing = entry.stat(follow_symlinks=False), target.lstat(entry.name)
            path = f"{key}/{entry.name}".removeprefix("/")
            self.progress(not stat.S_ISDIR(status.st_mode), "files compared")

            def row(
                action: str, other: str | None = None, *, path: str = path, status: os.stat_result = status
            ) -> MergeEntry:
                other_path = f"{path.rpartition('/')[0]}/{other}".removeprefix("/") if other else None
                return self._row(path, status, action, other_path)

            if existing is None:
                yield row("added")
                if stat.S_ISDIR(status.st_mode):
                    with original.enter(entry.name) as inner:
                        yield from self._within(inner, path)
            elif stat.S_ISDIR(status.st_mode) and stat.S_ISDIR(existing.st_mode):
                yield row("same")
                with original.enter(entry.name) as first, target.enter(entry.name) as second:
                    yield from self._compare(first, second, path)
            elif self._is_same(original, target, entry.name, status, existing):
                yield row("same")
            elif status.st_mtime_ns > existing.st_mtime_ns:
                yield row("newer", _other_name(target, entry.name, existing))
            else:
                other = _other_name(original, entry.name, status)
                # An interrupted run may have placed the folder already. A file's other name depends on its content.
                is_placed = stat.S_ISDIR(status.st_mode) and target.lstat(other) is not None
                yield row("same") if is_placed else row("older", other)

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
    suffix = f".firstlight-{digest.hexdigest()[:12]}"
    encoded = os.fsencode(name)
    return os.fsdecode(encoded[: _LONGEST_NAME - len(suffix)]) + suffix


def _kind(status: os.stat_result) -> str:
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    return "file" if stat.S_ISREG(status.st_mode) else "link" if stat.S_ISLNK(status.st_mode) else "special"


def _base(path: str | None) -> str:
    return (path or "").rpartition("/")[2]
