"""Copies folders with contents, links, holes, modes, owners, times and attributes, and verifies the copies."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, FirstlightError
from provision.fs import copy_file, tree
from provision.fs.kept_metadata import ALL_KEPT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from provision.fs.kept_metadata import KeptMetadata
    from provision.fs.open_dir import OpenDir

_ROUNDS = 5
CANNOT_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}

_Mark = tuple[int, int, int, int]


class TreeCopy:
    """Copies several folders together, so that hard links between their files are kept.

    A file that an interrupted earlier copy has left is reused if its size and modification time agree with the
    original. Its content is verified like that of every other copy.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[OpenDir, OpenDir]],
        progress: Callable[[int, str], None] | None = None,
        is_selected: Callable[[str], bool] | None = None,
        kept: KeptMetadata = ALL_KEPT,
    ) -> None:
        """Take the open folders, the callbacks, and the metadata that the copy keeps.

        Args:
            pairs: (original folder, folder for its copy).
            progress: called with (count since the last call, unit): copied "bytes" and "files", and "files proved",
                which are the verified files.
            is_selected: returns whether an entry is to be copied, by its path relative to its original; default: all.
            kept: the metadata that the file systems of both sides keep; only these are set and compared.
        """
        self.pairs = pairs
        self.progress = progress or (lambda _, __: None)
        self.is_selected = is_selected or (lambda _: True)
        self.kept = kept
        self._copied_marks: dict[str, _Mark] = {}
        self._unverified: set[str] = set()
        self._different: set[str] = set()
        self._copies: dict[tuple[int, int], tuple[OpenDir, str, int]] = {}
        self._block = (bytearray(copy_file.BLOCK), bytearray(copy_file.BLOCK))
        self._clone = True

    def run(self) -> None:
        """Copy and verify in up to five rounds, until a round finds no changed original and no different copy.

        Raises:
            BlockedError: a program still changes an original in the last round, an original contains a mount point, or
                the copy cannot store an owner or an extended attribute.
            FirstlightError: a copy still differs in the last round although its original has not changed.
            OSError: a file cannot be read or written.
        """
        for _ in range(_ROUNDS):
            changed = self.copy_changes()
            different = self._verify()
            if not changed and not different:
                return
            for key in different:
                self._copied_marks.pop(key, None)
            self._different.update(different)
        if different:
            path = different[0].partition("/")[2]
            raise FirstlightError(f"the copy of {path} still differs from its original after {_ROUNDS} attempts.")
        raise BlockedError(f"{changed[0]} keeps changing. End the program that writes to it, then run again.")

    def copy_changes(self) -> list[str]:
        """Bring every copy up to date with its original, and return the paths that were copied or deleted.

        An entry is copied if it has no copy yet, or has changed since it was copied. A copy without an original is
        deleted.
        """
        changed: list[str] = []
        self._copies.clear()  # a changed file is copied anew, with all its hard links
        for number, (original, copy) in enumerate(self.pairs):
            self._folder(original, copy, str(number), copy, changed)
        return changed

    def copy_entry(self, original: OpenDir, name: str, copy: OpenDir, new: str) -> None:
        """Copy the file or link `name` of one open folder to the name `new` in another, and verify the copy.

        Raises:
            FirstlightError: the copy differs from its original.
        """
        status = original.lstat(name)
        if status is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(original.path / name))
        if stat.S_ISLNK(status.st_mode):
            copy.symlink(new, original.readlink(name) or "")
            copy.copy_owner_and_times(new, status, self.kept)
            return
        self._file(original, copy, name, new)
        if not self.is_equal(original, copy, name, new):
            raise FirstlightError(f"the copy {copy.path / new} differs from its original {original.path / name}.")

    def original_has_changed(self) -> bool:
        """Return whether an original has changed since the last call of `copy_changes`; nothing is written."""
        for number, (original, _) in enumerate(self.pairs):
            current = dict(marks(original, str(number)))
            copied = {key: mark for key, mark in self._copied_marks.items() if key.startswith(f"{number}/")}
            if {key: mark for key, mark in current.items() if self.is_selected(key.partition("/")[2])} != copied:
                return True
        return False

    def _folder(self, original: OpenDir, copy: OpenDir, key: str, top: OpenDir, changed: list[str]) -> None:
        entries = {entry.name: entry for entry in copy.scan()}
        before = _status(original)
        if entries and copy.descriptor is not None:
            _make_writable(copy.descriptor)
        for entry in original.scan():
            name, entry_key = entry.name, f"{key}/{entry.name}"
            if not self.is_selected(entry_key.partition("/")[2]):
                continue
            status = entry.stat(follow_symlinks=False)
            existing = entries.pop(name, None)
            if stat.S_ISDIR(status.st_mode):
                if status.st_dev != before.st_dev:
                    raise BlockedError(f"{original.path / name} is a mount point. Unmount it, then run again.")
                with _open_pair(original, copy, name, existing, changed) as (first, second):
                    self._folder(first, second, entry_key, top, changed)
            elif not self._has_copy(entry_key, status, existing, top):
                if existing is not None:
                    tree.remove(copy, name)
                changed.append(f"{original.path}{os.sep}{name}")
                self._copied_marks[entry_key] = _mark(status)
                self._unverified.add(entry_key)
                with contextlib.suppress(
                    FileNotFoundError
                ):  # deleted meanwhile; the next call of `copy_changes` detects it
                    self._entry(original, copy, name, status, top, entry_key)
                    self.progress(1, "files")
        for name in entries:
            changed.append(f"{copy.path}{os.sep}{name}")
            tree.remove(copy, name)
        if original.descriptor is not None and copy.descriptor is not None:
            copy_file.copy_metadata(copy.descriptor, original.descriptor, before, str(original.path), self.kept)

    def _has_copy(self, key: str, status: os.stat_result, existing: os.DirEntry[str] | None, top: OpenDir) -> bool:
        """Return whether an entry has a current copy, made by this run or by an interrupted earlier run.

        Args:
            key: the number of the folder pair, a slash, and the relative path of the entry.
            status: the status of the original entry.
            existing: the entry of the same name in the copy, or None.
            top: the top folder of the copy.
        """
        mark = _mark(status)
        if existing is None:
            return False
        if key in self._copied_marks:
            return self._copied_marks[key] == mark
        if key in self._different:  # after a power loss, a file can have the right size and time but wrong content
            return False
        copied = existing.stat(follow_symlinks=False)
        alike = stat.S_ISREG(status.st_mode) and stat.S_ISREG(copied.st_mode)
        is_same_time = self.kept.is_same_time(copied.st_mtime_ns, status.st_mtime_ns)
        if not alike or copied.st_size != status.st_size or not is_same_time:
            return False
        if status.st_nlink > 1:
            inode = (status.st_dev, status.st_ino)
            first_copy = self._copies.setdefault(inode, (top, key.partition("/")[2], copied.st_ino))
            if copied.st_nlink == 1 or first_copy[2] != copied.st_ino:
                return False
        self._copied_marks[key] = mark
        self._unverified.add(key)
        return True

    def _entry(
        self, original: OpenDir, copy: OpenDir, name: str, status: os.stat_result, top: OpenDir, key: str
    ) -> None:
        inode = (status.st_dev, status.st_ino)
        path = key.partition("/")[2]
        if status.st_nlink > 1 and inode in self._copies and self._copies[inode][:2] != (top, path):
            try:
                self._copies[inode][0].hardlink(self._copies[inode][1], copy, name)
            except OSError as error:
                if error.errno not in CANNOT_LINK:
                    raise
            else:
                return
        if stat.S_ISREG(status.st_mode):
            self._file(original, copy, name)
        elif stat.S_ISLNK(status.st_mode):
            target = original.readlink(name)
            if target is None:
                return  # no longer a link; the next call of `copy_changes` detects it
            copy.symlink(name, target)
            copy.copy_owner_and_times(name, status, self.kept)
        else:
            copy.make_special(name, status)
            copy.copy_owner_and_times(name, status, self.kept)
        if status.st_nlink > 1:
            copied = copy.lstat(name)
            self._copies[inode] = (top, path, copied.st_ino if copied else 0)

    def _file(self, original: OpenDir, copy: OpenDir, name: str, new: str | None = None) -> None:
        try:
            source = original.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return  # it has become a link; the next call of `copy_changes` detects it
        try:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode):
                return  # no longer a regular file; the next call of `copy_changes` detects it
            target = copy.open(new or name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                self._clone = copy_file.copy(
                    source, target, status, lambda count: self.progress(count, "bytes"), clone=self._clone
                )
                if copy_file.BY_DESCRIPTOR:
                    copy_file.copy_metadata(target, source, status, f"{original.path}{os.sep}{name}", self.kept)
            finally:
                os.close(target)
            if not copy_file.BY_DESCRIPTOR:  # Windows: by path, after the file is closed
                copy_file.copy_metadata(
                    f"{copy.path}{os.sep}{new or name}", source, status, f"{original.path}{os.sep}{name}", self.kept
                )
        finally:
            os.close(source)

    def _verify(self) -> list[str]:
        """Compare the new copies with their originals byte by byte, and return the keys of the copies that differ."""
        different: list[str] = []
        if self._unverified:
            for number, (original, copy) in enumerate(self.pairs):
                copy.sync_file_system()
                self._verify_folder(original, copy, str(number), different)
        self._unverified = set(different)
        return different

    def _verify_folder(self, original: OpenDir, copy: OpenDir, key: str, different: list[str]) -> None:
        for entry in copy.scan():
            entry_key = f"{key}/{entry.name}"
            try:
                if entry.is_dir(follow_symlinks=False):
                    with original.enter(entry.name) as first, copy.enter(entry.name) as second:
                        self._verify_folder(first, second, entry_key, different)
                elif entry_key in self._unverified:
                    self.progress(1, "files proved")
                    if self.is_equal(original, copy, entry.name, entry.name):
                        continue
                    status = original.lstat(entry.name)
                    # An original that has changed since the copy is copied again by the next call of `copy_changes`.
                    if status is not None and self._copied_marks.get(entry_key) == _mark(status):
                        different.append(entry_key)
            except (FileNotFoundError, NotADirectoryError):
                different.append(entry_key)

    def is_equal(self, original: OpenDir, copy: OpenDir, name: str, new: str) -> bool:
        """Return whether the entry `name` of one open folder and its copy `new` in another are equal.

        Two files are equal if content and kept metadata agree, two links if their targets agree. An absent entry, or
        one of another kind, is never equal.
        """
        status, copied = original.lstat(name), copy.lstat(new)
        if status is None or copied is None or stat.S_IFMT(status.st_mode) != stat.S_IFMT(copied.st_mode):
            return False
        if not stat.S_ISREG(copied.st_mode):
            return original.readlink(name) == copy.readlink(new)
        first = original.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            second = copy.open(new, os.O_RDONLY)
            try:
                return copy_file.is_same(first, second, self._block, kept=self.kept)
            finally:
                os.close(second)
        finally:
            os.close(first)


@contextlib.contextmanager
def _open_pair(
    original: OpenDir, copy: OpenDir, name: str, existing: os.DirEntry[str] | None, changed: list[str]
) -> Iterator[tuple[OpenDir, OpenDir]]:
    """Open the subfolder `name` of an original and of its copy, and make it in the copy if it does not exist there.

    Args:
        original: the open original.
        copy: its open copy.
        name: the name of the subfolder in both.
        existing: the entry `name` of the copy, or None; a file or link there is deleted.
        changed: the list of changed paths, to which a new subfolder is added.
    """
    if existing is not None and not existing.is_dir(follow_symlinks=False):
        copy.unlink(name)
        existing = None
    if existing is None:
        copy.make(name)
        changed.append(f"{original.path}{os.sep}{name}")
    with original.enter(name) as first, copy.enter(name) as second:
        yield first, second


def _make_writable(folder: int) -> None:
    """Set the mode 0700 for a folder that an earlier run has copied; its set-group-ID bit stays."""
    with contextlib.suppress(PermissionError):  # a file system with fixed modes
        os.fchmod(folder, stat.S_IRWXU | os.fstat(folder).st_mode & stat.S_ISGID)


def marks(folder: OpenDir, key: str = "") -> Iterator[tuple[str, _Mark]]:
    """Yield (path, mark) for every entry of a tree that is not a folder.

    The path is `key`, a slash, and the path relative to `folder`. The mark is the result of `_mark`, a tuple that each
    change of the entry changes.
    """
    for entry in folder.scan():
        entry_key = f"{key}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            with folder.enter(entry.name) as inner:
                yield from marks(inner, entry_key)
        else:
            yield entry_key, _mark(entry.stat(follow_symlinks=False))


def _status(folder: OpenDir) -> os.stat_result:
    return os.lstat(folder.path) if folder.descriptor is None else os.fstat(folder.descriptor)


def _mark(status: os.stat_result) -> _Mark:
    """Return (change time in ns, size, inode, modification time in ns); each change of the entry changes this tuple."""
    return (status.st_ctime_ns, status.st_size, status.st_ino, status.st_mtime_ns)
