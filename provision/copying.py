"""Makes one folder the equal of another: contents, links, holes, modes, owners, times, attributes; then proves it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from provision import tree
from provision.errors import BlockedError, FirstlightError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from provision.folder import Folder

_ROUNDS = 5
_BLOCK = 1 << 20
_PIECE = 8 << 20  # between two looks at the keyboard
_FICLONE = 0x40049409  # linux/fs.h
_CANNOT_CLONE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF, errno.EPERM}
CANNOT_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_ATTRIBUTES = {errno.EOPNOTSUPP, errno.ENOSYS}
# The system's own labels: they belong to a place, not to a file.
_KEPT_ATTRIBUTES = ("user.", "system.posix_acl_", "security.capability")

_Mark = tuple[int, int, int, int]


class Mirror:
    """Copies folders onto others, together: a file with names in several of them stays one file.

    What a killed copy left is taken where size and time agree, and proven by content like the rest.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Folder, Folder]],
        progress: Callable[[int], None] | None = None,
        wanted: Callable[[str], bool] | None = None,
    ) -> None:
        """Take (original, copy) folders, who is told the bytes, and which relative paths are copied (else all)."""
        self.pairs = pairs
        self.progress = progress or (lambda _: None)
        self.wanted = wanted or (lambda _: True)
        self._seen: dict[str, _Mark] = {}
        self._unproven: set[str] = set()
        self._copies: dict[tuple[int, int], tuple[Folder, str, int]] = {}
        self._block = (bytearray(_BLOCK), bytearray(_BLOCK))
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

    def changed_since(self) -> bool:
        """Whether an original was touched after the last look; writes nothing."""
        for number, (original, _) in enumerate(self.pairs):
            found = dict(marks(original, str(number)))
            known = {key: mark for key, mark in self._seen.items() if key.startswith(f"{number}/")}
            if {key: mark for key, mark in found.items() if self.wanted(key.partition("/")[2])} != known:
                return True
        return False

    def _folder(self, original: Folder, copy: Folder, key: str, top: Folder, changed: list[str]) -> None:
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
        for name in there:
            changed.append(f"{copy.path}{os.sep}{name}")
            tree.remove(copy, name)
        if original.descriptor is not None and copy.descriptor is not None:
            _dress(copy.descriptor, original.descriptor, before, str(original.path))

    def _is_there(self, key: str, found: os.stat_result, had: os.DirEntry[str] | None, top: Folder) -> bool:
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

    def _entry(self, original: Folder, copy: Folder, name: str, found: os.stat_result, top: Folder, key: str) -> None:
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

    def _file(self, original: Folder, copy: Folder, name: str) -> None:
        source = original.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                return  # it has become something else: the next look sees it
            target = copy.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                self._data(source, target, found)
                _dress(target, source, found, f"{original.path}{os.sep}{name}")
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _data(self, source: int, target: int, found: os.stat_result) -> None:
        if found.st_size <= _BLOCK and not tree.is_sparse(found):
            _write(target, os.read(source, found.st_size))
            self.progress(found.st_size)
            return
        self._clone = self._clone and _cloned(source, target)
        if self._clone:
            self.progress(found.st_size)
            return
        pieces = tree.extents(source, found.st_size) if tree.is_sparse(found) else [(0, found.st_size)]
        os.ftruncate(target, found.st_size)
        for start, end in pieces:
            self._piece(source, target, start, end)

    def _piece(self, source: int, target: int, start: int, end: int) -> None:
        """Copy a range inside the kernel, or block by block where it will not."""
        os.lseek(target, start, os.SEEK_SET)
        os.lseek(source, start, os.SEEK_SET)
        inside = hasattr(os, "copy_file_range")
        while start < end:
            count = 0
            if inside:
                with contextlib.suppress(OSError):
                    count = os.copy_file_range(source, target, min(_PIECE, end - start))
                inside = count > 0
            if count == 0:
                content = os.read(source, min(_BLOCK, end - start))
                if not content:
                    return  # it has been cut: the next look sees it
                count = len(content)
                _write(target, content)
            start += count
            self.progress(count)

    def _prove(self) -> list[str]:
        """Read what was copied, and its originals, and compare; return the keys of what differs."""
        wrong: list[str] = []
        if self._unproven:
            for number, (original, copy) in enumerate(self.pairs):
                copy.sync_file_system()
                self._prove_folder(original, copy, str(number), wrong)
        self._unproven = set(wrong)
        return wrong

    def _prove_folder(self, original: Folder, copy: Folder, key: str, wrong: list[str]) -> None:
        for entry in copy.scan():
            below = f"{key}/{entry.name}"
            try:
                if entry.is_dir(follow_symlinks=False):
                    with original.enter(entry.name) as first, copy.enter(entry.name) as second:
                        self._prove_folder(first, second, below, wrong)
                elif below in self._unproven and not self._is_equal(original, copy, entry):
                    found = original.lstat(entry.name)
                    if found is not None and self._seen.get(below) == _mark(found):
                        wrong.append(below)  # else it has changed since, and the next look copies it again
            except (FileNotFoundError, NotADirectoryError):
                wrong.append(below)

    def _is_equal(self, original: Folder, copy: Folder, entry: os.DirEntry[str]) -> bool:
        if not entry.is_file(follow_symlinks=False):
            return original.readlink(entry.name) == copy.readlink(entry.name)
        first = original.open(entry.name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            second = copy.open(entry.name, os.O_RDONLY)
            try:
                return same_content(first, second, self._block)
            finally:
                os.close(second)
        finally:
            os.close(first)


@contextlib.contextmanager
def _entered(
    original: Folder, copy: Folder, name: str, had: os.DirEntry[str] | None, changed: list[str]
) -> Iterator[tuple[Folder, Folder]]:
    """Open a folder and its copy, which is made where it is not there."""
    if had is not None and not had.is_dir(follow_symlinks=False):
        copy.unlink(name)
        had = None
    if had is None:
        copy.make(name)
        changed.append(f"{original.path}{os.sep}{name}")
    with original.enter(name) as first, copy.enter(name) as second:
        yield first, second


def marks(folder: Folder, key: str = "") -> Iterator[tuple[str, _Mark]]:
    """Every file and link of a tree (no folder), as (key/path, what changes when somebody touches it)."""
    for entry in folder.scan():
        below = f"{key}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            with folder.enter(entry.name) as inner:
                yield from marks(inner, below)
        else:
            yield below, _mark(entry.stat(follow_symlinks=False))


def same_content(first: int, second: int, block: tuple[bytearray, bytearray], *, alone: bool = False) -> bool:
    """Whether two open files are equal in every byte, and (unless content `alone` counts) in mode and time.

    Holes count as zeros, and are not read where both have them.
    """
    one, other = os.fstat(first), os.fstat(second)
    if one.st_size != other.st_size:
        return False
    if not alone and (one.st_mtime_ns, one.st_mode) != (other.st_mtime_ns, other.st_mode):
        return False
    if one.st_size <= _BLOCK:
        return os.read(first, one.st_size + 1) == os.read(second, one.st_size + 1)
    if not (tree.is_sparse(one) and tree.is_sparse(other)):
        return _same_range(first, second, 0, one.st_size, block)
    # What either file has data in is read in both.
    pieces = tree.extents(first, one.st_size) + tree.extents(second, one.st_size)
    return all(_same_range(first, second, start, end, block) for start, end in pieces)


def _same_range(first: int, second: int, start: int, end: int, block: tuple[bytearray, bytearray]) -> bool:
    one, other = block
    while start < end:
        count = _read_at(first, one, start)
        if count <= 0 or _read_at(second, other, start) != count:
            return False
        if count < len(one):
            return one[:count] == other[:count] and start + count >= end
        if one != other:
            return False
        start += count
    return True


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _read_at(descriptor: int, block: bytearray, start: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [block], start)
    os.lseek(descriptor, start, os.SEEK_SET)
    content = os.read(descriptor, len(block))
    block[: len(content)] = content
    return len(content)


def _cloned(source: int, target: int) -> bool:
    """Whether the file system let both files share their blocks (btrfs, xfs)."""
    try:
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
    except ImportError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT_CLONE:
            raise
        return False
    return True


def _dress(target: int, source: int, found: os.stat_result, path: str) -> None:
    """Give a file or folder the owner, attributes, mode and times of its original, in the order that keeps them.

    Raises:
        BlockedError: the other file system cannot hold one of them.
    """
    made = os.fstat(target)
    if hasattr(os, "fchown") and (made.st_uid, made.st_gid) != (found.st_uid, found.st_gid):
        try:
            os.fchown(target, found.st_uid, found.st_gid)
        except PermissionError:
            # A group that we are not in is given up, as every copying tool does; an owner is not.
            if made.st_uid != found.st_uid:
                raise BlockedError(
                    f"{path} belongs to user {found.st_uid}, and a copy there would not. Leave it where it is, "
                    f"or change its owner: chown -R --no-dereference {made.st_uid} {path}"
                ) from None
    if hasattr(os, "listxattr"):
        _attributes(target, source, path)
    os.chmod(target, stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _attributes(target: int, source: int, path: str) -> None:
    try:
        names = os.listxattr(source)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        return
    for name in names:
        if not name.startswith(_KEPT_ATTRIBUTES):
            continue
        try:
            os.setxattr(target, name, os.getxattr(source, name))
        except OSError as error:
            raise BlockedError(
                f"{path} has the extended attribute {name}, which cannot be kept there ({error.strerror}). "
                f"If nobody needs it: setfattr -x {name} {path}"
            ) from None


def _status(folder: Folder) -> os.stat_result:
    return os.lstat(folder.path) if folder.descriptor is None else os.fstat(folder.descriptor)


def _mark(found: os.stat_result) -> _Mark:
    """What changes when somebody touches an entry."""
    return (found.st_ctime_ns, found.st_size, found.st_ino, found.st_mtime_ns)
