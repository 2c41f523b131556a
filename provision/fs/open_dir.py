"""An open folder, and what is done inside it: by its descriptor, so that a bent path leads nowhere else.

A name is always one component. On Windows, which has no such descriptors, the folder's path stands in.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from provision.core.errors import BlockedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Concatenate

    from typing_extensions import ParamSpec, Self

if TYPE_CHECKING:
    _P = ParamSpec("_P")

_R = TypeVar("_R")
_BY_DESCRIPTOR = os.open in os.supports_dir_fd
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _NO_FOLLOW | getattr(os, "O_CLOEXEC", 0)
_SEARCH = _DIRECTORY | getattr(os, "O_PATH", 0)  # a folder on the way need not be readable
_MOST_LINKS = 40  # as many as the kernel follows
_RENAME_EXCHANGE = 2  # linux/fs.h
_NO_PRIVILEGE = 1314  # winerror.h, ERROR_PRIVILEGE_NOT_HELD


def _naming(act: Callable[Concatenate[OpenDir, str, _P], _R]) -> Callable[Concatenate[OpenDir, str, _P], _R]:
    """Let an error name the whole path, not the one component that the system was given."""

    @functools.wraps(act)
    def named(self: OpenDir, name: str, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return act(self, name, *args, **kwargs)
        except OSError as error:
            error.filename = str(self.path / name)
            raise

    return cast("Callable[Concatenate[OpenDir, str, _P], _R]", named)


class OpenDir:
    """One open folder. Close it, or use it in a `with`."""

    def __init__(self, descriptor: int | None, path: Path) -> None:
        """Take the descriptor (None on Windows), and the path for messages."""
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def at(cls, path: Path) -> OpenDir:
        """Open a folder; of the links on its way only root's and our own are followed.

        Raises:
            BlockedError: somebody else's link lies on the way.
            OSError: it is not there, or no folder.
        """
        if not _BY_DESCRIPTOR:
            real = path.resolve(strict=True)
            return cls(None, real)
        return _walk(path)

    @_naming
    def enter(self, name: str) -> OpenDir:
        """Open a folder in this one; a link is refused.

        Raises:
            OSError: it is not there, no folder, or a link (ELOOP, ENOTDIR).
        """
        if self.descriptor is None:
            path = self.path / name
            if not stat.S_ISDIR(os.lstat(path).st_mode) or link_target(path) is not None:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            return OpenDir(None, path)
        return OpenDir(os.open(name, _DIRECTORY, dir_fd=self.descriptor), self.path / name)

    def scan(self) -> list[os.DirEntry[str]]:
        """What is in it, in no order; each with a `stat` that follows no link."""
        with os.scandir(self.path if self.descriptor is None else self.descriptor) as entries:
            return list(entries)

    @_naming
    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """Open a file; a link is refused."""
        return os.open(self._name(name), flags | _NO_FOLLOW | _BINARY, mode, dir_fd=self.descriptor)

    def lstat(self, name: str) -> os.stat_result | None:
        """What is under a name, no link followed; None where nothing is."""
        try:
            return os.stat(self._name(name), dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def readlink(self, name: str) -> str | None:
        """Where a link (or junction) leads; None where there is no link."""
        return link_target(self._name(name), self.descriptor)

    @_naming
    def make(self, name: str) -> None:
        """Make a folder that only we can enter."""
        os.mkdir(self._name(name), 0o700, dir_fd=self.descriptor)

    @_naming
    def symlink(self, name: str, target: str) -> None:
        """Make a link to a folder; a junction where Windows grants no right to make links."""
        try:
            os.symlink(target, self._name(name), target_is_directory=True, dir_fd=self.descriptor)
        except OSError as error:
            if getattr(error, "winerror", None) != _NO_PRIVILEGE:
                raise
            import _winapi

            _winapi.CreateJunction(target, self._name(name))  # type: ignore[attr-defined,unused-ignore]

    @_naming
    def unlink(self, name: str) -> None:
        """Take a file or link away; a junction is a folder to Windows."""
        try:
            os.unlink(self._name(name), dir_fd=self.descriptor)
        except PermissionError:
            if self.descriptor is not None or self.readlink(name) is None:
                raise
            self.rmdir(name)

    @_naming
    def rmdir(self, name: str) -> None:
        """Take an empty folder away."""
        os.rmdir(self._name(name), dir_fd=self.descriptor)

    @_naming
    def rename(self, name: str, other: OpenDir, new: str) -> None:
        """Give it another name, in this or another open folder: the one place where a rename is made."""
        os.rename(self._name(name), other._name(new), src_dir_fd=self.descriptor, dst_dir_fd=other.descriptor)

    def exchange(self, name: str, other: OpenDir, new: str) -> None:
        """Swap what two names stand for, at one instant.

        Raises:
            OSError: the system or the file system cannot (ENOSYS, EINVAL), or not between these (EXDEV).
        """
        call = getattr(_libc(), "renameat2", None)
        if self.descriptor is None or call is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(self.path / name))
        first, second = os.fsencode(name), os.fsencode(new)
        if call(self.descriptor, first, other.descriptor, second, _RENAME_EXCHANGE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self.path / name))

    @_naming
    def hardlink(self, name: str, other: OpenDir, new: str) -> None:
        """Give a file a second name in another open folder."""
        os.link(
            self._name(name),
            other._name(new),
            src_dir_fd=self.descriptor,
            dst_dir_fd=other.descriptor,
            follow_symlinks=False,
        )

    @_naming
    def special(self, name: str, found: os.stat_result) -> None:
        """Make a pipe, socket or device like the one that was found."""
        os.mknod(self._name(name), found.st_mode, found.st_rdev, dir_fd=self.descriptor)

    @_naming
    def dress(self, name: str, found: os.stat_result) -> None:
        """Give a link or special file the owner and times of its original."""
        if os.chown in os.supports_dir_fd and (made := self.lstat(name)) and made.st_uid != found.st_uid:
            os.chown(self._name(name), found.st_uid, found.st_gid, dir_fd=self.descriptor, follow_symlinks=False)
        if os.utime in os.supports_follow_symlinks:
            times = (found.st_atime_ns, found.st_mtime_ns)
            os.utime(self._name(name), ns=times, dir_fd=self.descriptor, follow_symlinks=False)

    @_naming
    def stamp(self, name: str, mode: int, mtime_ns: int) -> None:
        """Give a file or folder a mode and a time of change; of a link, the time alone."""
        if self.readlink(name) is None:
            os.chmod(self._name(name), mode, dir_fd=self.descriptor)
        if os.utime in os.supports_follow_symlinks:
            times = (mtime_ns, mtime_ns)
            os.utime(self._name(name), ns=times, dir_fd=self.descriptor, follow_symlinks=False)

    def sync(self) -> None:
        """Force the folder's names to the disk."""
        if self.descriptor is not None:
            os.fsync(self.descriptor)

    def sync_file_system(self) -> None:
        """Force all that was written to this file system to the disk, in one call where there is one.

        Raises:
            OSError: the disk could not take it (EIO, ENOSPC).
        """
        call = getattr(_libc(), "syncfs", None)
        if self.descriptor is None or call is None:
            if hasattr(os, "sync"):
                os.sync()
            return
        if call(self.descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self.path))

    def close(self) -> None:
        """Give the descriptor back."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name(self, name: str) -> str:
        return name if self.descriptor is not None else str(self.path / name)


def link_target(path: str | Path, descriptor: int | None = None) -> str | None:
    """Where a link (or junction) leads, as it is written; None where there is no link."""
    try:
        return os.readlink(path, dir_fd=descriptor).removeprefix("\\\\?\\")
    except OSError:
        return None


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None


def _walk(path: Path) -> OpenDir:
    """Open a path component by component, no link followed by the system itself."""
    todo = list(reversed(path.absolute().parts[1:]))
    real = Path(path.anchor or os.sep)
    here = os.open(real, _SEARCH)
    links = 0
    try:
        while todo:
            part = todo.pop()
            if part == os.pardir:
                # The folders so far are real, so their parents are what is meant.
                real = real.parent
                above = os.open(os.pardir, _SEARCH, dir_fd=here)
                os.close(here)
                here = above
                continue
            try:
                below = os.open(part, _SEARCH if todo else _DIRECTORY, dir_fd=here)
            except OSError as error:
                target = link_target(part, here) if error.errno in {errno.ELOOP, errno.ENOTDIR} else None
                if target is None:
                    error.filename = str(real / part)
                    raise
                links += 1
                _check_owner(here, part, real / part, links)
                parts = Path(target).parts
                if Path(target).is_absolute():
                    os.close(here)
                    real = Path(Path(target).anchor)
                    here = os.open(real, _SEARCH)
                    parts = parts[1:]
                todo += reversed(parts)
                continue
            os.close(here)
            here = below
            real /= part
        if not stat.S_ISDIR(os.fstat(here).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        readable = os.open(os.curdir, _DIRECTORY, dir_fd=here)
    finally:
        os.close(here)
    return OpenDir(readable, real)


def _check_owner(here: int, part: str, path: Path, links: int) -> None:
    owner = os.stat(part, dir_fd=here, follow_symlinks=False).st_uid
    if owner not in {0, os.geteuid()}:
        raise BlockedError(f"{path} is a link that user {owner} made, so it is not followed. Look at it: ls -ld {path}")
    if links > _MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
