"""Makes one folder the equal of another: contents, links, holes, modes, owners, times, attributes; then proves it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, FirstlightError
from provision.fs import copy_file, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from provision.fs.open_dir import OpenDir

_ROUNDS = 5
CANNOT_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}

_Mark = tuple[int, int, int, int]


class TreeCopy:
    """Copies folders onto others, together: a file with names in several of them stays one file.

    What a killed copy left is taken where size and time agree, and proven by content like the rest.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[OpenDir, OpenDir]],
        progress: Callable[[int, str], None] | None = None,
        wanted: Callable[[str], bool] | None = None,
    ) -> None:
        """Take (original, copy) folders, a callback of (count, unit), and the relative paths to copy (else all)."""
        self.pairs = pairs
        self.progress = progress or (lambda _, __: None)
        self.wanted = wanted or (lambda _: True)
        self._seen: dict[str, _Mark] = {}
        self._unproven: set[str] = set()
        self._copies: dict[tuple[int, int], tuple[OpenDir, str, int]] = {}
        self._block = (bytearray(copy_file.BLOCK), bytearray(copy_file.BLOCK))
        self._clone = True

    def run(self) -> None:
        """Copy, prove, look at the originals again, until nothing has changed between two looks.

        Raises:
            BlockedError: something keeps writing, or a thing cannot be kept there (owner, attribute).
            FirstlightError: a copy differs though its original stands still.
            OSError: what the systems say.
        """
        for _ in range(_ROUNDS):
            changed = self.look()
            wrong = self._prove()
            if not changed and not wrong:
                return
            for key in wrong:
                self._seen.pop(key, None)
        if wrong:
            raise FirstlightError(f"{wrong[0]} does not come out the same as its original, {_ROUNDS} times over.")
        raise BlockedError(f"{changed[0]} keeps changing. End what writes there, then run again.")

    def look(self) -> list[str]:
        """Copy what is not as the original is now; return what that was."""
        changed: list[str] = []
        self._copies.clear()  # a file that has changed becomes a new file, with all its names
        for number, (original, copy) in enumerate(self.pairs):
            self._folder(original, copy, str(number), copy, changed)
        return changed

    def one(self, original: OpenDir, name: str, copy: OpenDir, new: str) -> None:
        """Copy one entry that is no folder under another name, and prove it.

        Raises:
            FirstlightError: the copy differs.
        """
        found = original.lstat(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(original.path / name))
        if stat.S_ISLNK(found.st_mode):
            copy.symlink(new, original.readlink(name) or "")
            copy.dress(new, found)
            return
        self._file(original, copy, name, new)
        if not self.is_equal(original, copy, name, new):
            raise FirstlightError(f"{copy.path / new} does not come out the same as {original.path / name}.")

    def changed_since(self) -> bool:
        """Whether an original was touched after the last look; writes nothing."""
        for number, (original, _) in enumerate(self.pairs):
            found = dict(marks(original, str(number)))
            known = {key: mark for key, mark in self._seen.items() if key.startswith(f"{number}/")}
            if {key: mark for key, mark in found.items() if self.wanted(key.partition("/")[2])} != known:
                return True
        return False

    def _folder(self, original: OpenDir, copy: OpenDir, key: str, top: OpenDir, changed: list[str]) -> None:
        there = {entry.name: entry for entry in copy.scan()}
        before = _status(original)
        if there and copy.descriptor is not None:
            os.fchmod(copy.descriptor, 0o700)
        for entry in original.scan():
            name, below = entry.name, f"{key}/{entry.name}"
            if not self.wanted(below.partition("/")[2]):
                continue
            found = entry.stat(follow_symlinks=False)
            had = there.pop(name, None)
            if stat.S_ISDIR(found.st_mode):
                if found.st_dev != before.st_dev:
                    raise BlockedError(f"{original.path / name} is a mount of its own. Unmount it, then run again.")
                with _entered(original, copy, name, had, changed) as (first, second):
                    self._folder(first, second, below, top, changed)
            elif not self._is_there(below, found, had, top):
                if had is not None:
                    tree.remove(copy, name)
                changed.append(f"{original.path}{os.sep}{name}")
                self._seen[below] = _mark(found)
                self._unproven.add(below)
                with contextlib.suppress(FileNotFoundError):  # taken away meanwhile: the next look sees it
                    self._entry(original, copy, name, found, top, below)
                    self.progress(1, "files")
        for name in there:
            changed.append(f"{copy.path}{os.sep}{name}")
            tree.remove(copy, name)
        if original.descriptor is not None and copy.descriptor is not None:
            copy_file.dress(copy.descriptor, original.descriptor, before, str(original.path))

    def _is_there(self, key: str, found: os.stat_result, had: os.DirEntry[str] | None, top: OpenDir) -> bool:
        """Whether this entry needs no copying: it was copied and has not changed since, or an earlier run did it."""
        mark = _mark(found)
        if had is None:
            return False
        if key in self._seen:
            return self._seen[key] == mark
        copied = had.stat(follow_symlinks=False)
        alike = stat.S_ISREG(found.st_mode) and stat.S_ISREG(copied.st_mode)
        if not alike or (copied.st_size, copied.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
            return False
        if found.st_nlink > 1:
            one = (found.st_dev, found.st_ino)
            known = self._copies.setdefault(one, (top, key.partition("/")[2], copied.st_ino))
            if copied.st_nlink == 1 or known[2] != copied.st_ino:
                return False
        self._seen[key] = mark
        self._unproven.add(key)
        return True

    def _entry(
        self, original: OpenDir, copy: OpenDir, name: str, found: os.stat_result, top: OpenDir, key: str
    ) -> None:
        one = (found.st_dev, found.st_ino)
        place = key.partition("/")[2]
        if found.st_nlink > 1 and one in self._copies and self._copies[one][:2] != (top, place):
            try:
                self._copies[one][0].hardlink(self._copies[one][1], copy, name)
            except OSError as error:
                if error.errno not in CANNOT_LINK:
                    raise
            else:
                return
        if stat.S_ISREG(found.st_mode):
            self._file(original, copy, name)
        elif stat.S_ISLNK(found.st_mode):
            target = original.readlink(name)
            if target is None:
                return  # it has become something else: the next look sees it
            copy.symlink(name, target)
            copy.dress(name, found)
        else:
            copy.special(name, found)
            copy.dress(name, found)
        if found.st_nlink > 1:
            made = copy.lstat(name)
            self._copies[one] = (top, place, made.st_ino if made else 0)

    def _file(self, original: OpenDir, copy: OpenDir, name: str, new: str | None = None) -> None:
        try:
            source = original.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return  # it has become a link: the next look sees it
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                return  # it has become something else: the next look sees it
            target = copy.open(new or name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                self._clone = copy_file.copy(
                    source, target, found, lambda count: self.progress(count, "bytes"), clone=self._clone
                )
                if copy_file.BY_DESCRIPTOR:
                    copy_file.dress(target, source, found, f"{original.path}{os.sep}{name}")
            finally:
                os.close(target)
            if not copy_file.BY_DESCRIPTOR:  # Windows: by the path, when nobody writes to it any more
                copy_file.dress(f"{copy.path}{os.sep}{new or name}", source, found, f"{original.path}{os.sep}{name}")
        finally:
            os.close(source)

    def _prove(self) -> list[str]:
        """Read what was copied, and its originals, and compare; return the keys of what differs."""
        wrong: list[str] = []
        if self._unproven:
            for number, (original, copy) in enumerate(self.pairs):
                copy.sync_file_system()
                self._prove_folder(original, copy, str(number), wrong)
        self._unproven = set(wrong)
        return wrong

    def _prove_folder(self, original: OpenDir, copy: OpenDir, key: str, wrong: list[str]) -> None:
        for entry in copy.scan():
            below = f"{key}/{entry.name}"
            try:
                if entry.is_dir(follow_symlinks=False):
                    with original.enter(entry.name) as first, copy.enter(entry.name) as second:
                        self._prove_folder(first, second, below, wrong)
                elif below in self._unproven:
                    self.progress(1, "files proved")
                    if self.is_equal(original, copy, entry.name, entry.name):
                        continue
                    found = original.lstat(entry.name)
                    if found is not None and self._seen.get(below) == _mark(found):
                        wrong.append(below)  # else it has changed since, and the next look copies it again
            except (FileNotFoundError, NotADirectoryError):
                wrong.append(below)

    def is_equal(self, original: OpenDir, copy: OpenDir, name: str, new: str) -> bool:
        """Whether a file, or a link, is the same under two names, in content, mode and time."""
        made = copy.lstat(new)
        if made is None or not stat.S_ISREG(made.st_mode):
            return original.readlink(name) == copy.readlink(new)
        first = original.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            second = copy.open(new, os.O_RDONLY)
            try:
                return copy_file.same(first, second, self._block)
            finally:
                os.close(second)
        finally:
            os.close(first)


@contextlib.contextmanager
def _entered(
    original: OpenDir, copy: OpenDir, name: str, had: os.DirEntry[str] | None, changed: list[str]
) -> Iterator[tuple[OpenDir, OpenDir]]:
    """Open a folder and its copy, which is made where it is not there."""
    if had is not None and not had.is_dir(follow_symlinks=False):
        copy.unlink(name)
        had = None
    if had is None:
        copy.make(name)
        changed.append(f"{original.path}{os.sep}{name}")
    with original.enter(name) as first, copy.enter(name) as second:
        yield first, second


def marks(folder: OpenDir, key: str = "") -> Iterator[tuple[str, _Mark]]:
    """Every file and link of a tree (no folder), as (key/path, what changes when somebody touches it)."""
    for entry in folder.scan():
        below = f"{key}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            with folder.enter(entry.name) as inner:
                yield from marks(inner, below)
        else:
            yield below, _mark(entry.stat(follow_symlinks=False))


def _status(folder: OpenDir) -> os.stat_result:
    return os.lstat(folder.path) if folder.descriptor is None else os.fstat(folder.descriptor)


def _mark(found: os.stat_result) -> _Mark:
    """What changes when somebody touches an entry."""
    return (found.st_ctime_ns, found.st_size, found.st_ino, found.st_mtime_ns)
