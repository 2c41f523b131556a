"""Puts what lies in one folder into another that holds things too: nothing is discarded, the newest has the name."""

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
    """One entry of the folder that is put into the other.

    `action`: "same" (it was there), "added", "within" (it lies in a folder that was added), "newer" (it took the name,
    what was there is at `other`), "older" (it is at `other`). A folder comes before what lies in it.
    `mode`, `size` and `mtime_ns` are the entry's own; `twin` is an earlier entry that is the same file.
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
        """As plain JSON types."""
        return asdict(self)

    @property
    def kept_at(self) -> str:
        """Where in the merged folder this entry is."""
        return (self.other or self.path) if self.action == "older" else self.path


class TreeMerge:
    """`original` into `target`, by way of `stage`, an empty folder of ours on the target's file system."""

    def __init__(
        self, original: OpenDir, target: OpenDir, stage: OpenDir, progress: Callable[[int, str], None] | None = None
    ) -> None:
        """Take the three open folders, and a callback of (count, "files compared" or a unit of the copy)."""
        self.progress = progress or (lambda _, __: None)
        self.original = original
        self.target = target
        self.stage = stage
        self._block = (bytearray(copy_file.BLOCK), bytearray(copy_file.BLOCK))
        self._marks: dict[str, object] = {}
        self._first: dict[int, str] = {}

    def look(self) -> list[MergeEntry]:
        """Compare both, byte by byte where names meet, and say what is to be done."""
        self._marks = dict(marks(self.original))
        self._first.clear()
        return list(self._look(self.original, self.target, ""))

    def bring(self, rows: Sequence[MergeEntry]) -> None:
        """Copy to the stage what is not in the target yet, and prove it."""
        needed = {row.path for row in rows if row.action not in _NOT_PLACED}
        on_the_way = {above for path in needed for above in _above(path)}

        def wanted(path: str) -> bool:
            return path in on_the_way or path in needed or any(above in needed for above in _above(path))

        TreeCopy([(self.original, self.stage)], self.progress, wanted).run()
        self.stage.sync_file_system()

    def place(self, rows: Sequence[MergeEntry]) -> None:
        """Give everything on the stage its name in the target. Each act leaves both contents under some name."""
        for row in rows:
            if row.action in _NOT_PLACED:
                continue
            with holding(self.stage, row.path) as (stage, name), holding(self.target, row.path) as (target, _):
                if row.action == "older":
                    stage.rename(name, target, _base(row.other))
                    continue
                if row.action == "newer":
                    _give_way(target, name, _base(row.other))
                stage.rename(name, target, name)
        self.target.sync_file_system()

    def changed_since(self) -> bool:
        """Whether the original was touched after the look."""
        return dict(marks(self.original)) != self._marks

    def _look(self, original: OpenDir, target: OpenDir, key: str) -> Iterator[MergeEntry]:
        for entry in sorted(original.scan(), key=lambda each: each.name):
            found, there = entry.stat(follow_symlinks=False), target.lstat(entry.name)
            path = f"{key}/{entry.name}".removeprefix("/")
            self.progress(not stat.S_ISDIR(found.st_mode), "files compared")

            def row(
                action: str, other: str | None = None, *, path: str = path, found: os.stat_result = found
            ) -> MergeEntry:
                place = f"{path.rpartition('/')[0]}/{other}".removeprefix("/") if other else None
                return self._row(path, found, action, place)

            if there is None:
                yield row("added")
                if stat.S_ISDIR(found.st_mode):
                    with original.enter(entry.name) as inner:
                        yield from self._within(inner, path)
            elif stat.S_ISDIR(found.st_mode) and stat.S_ISDIR(there.st_mode):
                yield row("same")
                with original.enter(entry.name) as first, target.enter(entry.name) as second:
                    yield from self._look(first, second, path)
            elif self._is_same(original, target, entry.name, found, there):
                yield row("same")
            elif found.st_mtime_ns > there.st_mtime_ns:
                yield row("newer", _other_name(target, entry.name, there))
            else:
                other = _other_name(original, entry.name, found)
                # A folder that a killed run has kept is not kept again; a file's place comes from its content.
                kept = stat.S_ISDIR(found.st_mode) and target.lstat(other) is not None
                yield row("same") if kept else row("older", other)

    def _row(self, path: str, found: os.stat_result, action: str, other: str | None) -> MergeEntry:
        twin = None
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            first = self._first.setdefault(found.st_ino, path)
            twin = first if first != path else None
        mode = stat.S_IMODE(found.st_mode)
        return MergeEntry(path, _kind(found), action, other, mode, found.st_size, found.st_mtime_ns, twin)

    def _within(self, folder: OpenDir, key: str) -> Iterator[MergeEntry]:
        for entry in sorted(folder.scan(), key=lambda each: each.name):
            found = entry.stat(follow_symlinks=False)
            yield self._row(f"{key}/{entry.name}", found, "within", None)
            if stat.S_ISDIR(found.st_mode):
                with folder.enter(entry.name) as inner:
                    yield from self._within(inner, f"{key}/{entry.name}")

    def _is_same(
        self, original: OpenDir, target: OpenDir, name: str, found: os.stat_result, there: os.stat_result
    ) -> bool:
        if stat.S_IFMT(found.st_mode) != stat.S_IFMT(there.st_mode):
            return False
        if not stat.S_ISREG(found.st_mode):
            return original.readlink(name) == target.readlink(name)
        if found.st_size != there.st_size:
            return False
        first = original.open(name, os.O_RDONLY)
        try:
            second = target.open(name, os.O_RDONLY)
            try:
                return copy_file.same(first, second, self._block, alone=True)
            finally:
                os.close(second)
        finally:
            os.close(first)


def _above(path: str) -> Iterator[str]:
    """Every folder in which a relative path lies."""
    while path := path.rpartition("/")[0]:
        yield path


def _give_way(folder: OpenDir, name: str, other: str) -> None:
    """Let what is under a name be under another one as well, or only, so that the name can be taken."""
    found = folder.lstat(name)
    if found is None:
        return
    if not stat.S_ISDIR(found.st_mode):
        try:
            if folder.lstat(other) is None:
                folder.hardlink(name, folder, other)
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise
        else:
            return
    folder.rename(name, folder, other)


@contextlib.contextmanager
def holding(top: OpenDir, path: str) -> Iterator[tuple[OpenDir, str]]:
    """Open the folder in which a relative path lies; yields it and the path's last name."""
    *parts, name = path.split("/")
    with contextlib.ExitStack() as stack:
        here = top
        for part in parts:
            here = stack.enter_context(here.enter(part))
        yield here, name


def _other_name(folder: OpenDir, name: str, found: os.stat_result) -> str:
    """A name for what does not get its own: the same at every try, since it comes from the content."""
    if stat.S_ISREG(found.st_mode):
        digest = hashlib.sha256()
        descriptor = folder.open(name, os.O_RDONLY)
        with os.fdopen(descriptor, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    elif stat.S_ISLNK(found.st_mode):
        digest = hashlib.sha256(os.fsencode(folder.readlink(name) or ""))
    else:
        digest = hashlib.sha256(f"{found.st_mode} {found.st_mtime_ns}".encode())
    suffix = f".firstlight-{digest.hexdigest()[:12]}"
    whole = os.fsencode(name)
    return os.fsdecode(whole[: _LONGEST_NAME - len(suffix)]) + suffix


def _kind(found: os.stat_result) -> str:
    if stat.S_ISDIR(found.st_mode):
        return "folder"
    return "file" if stat.S_ISREG(found.st_mode) else "link" if stat.S_ISLNK(found.st_mode) else "special"


def _base(path: str | None) -> str:
    return (path or "").rpartition("/")[2]
