"""Works on the entries of an open folder through its descriptor, so that a changed path cannot lead to another folder.

An entry's name is always one path component. Windows has no descriptors of folders, so there the path is used.
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
from provision.fs import durable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Concatenate

    from typing_extensions import ParamSpec, Self

    from provision.fs.kept_metadata import KeptMetadata

if TYPE_CHECKING:
    _P = ParamSpec("_P")

_R = TypeVar("_R")
_BY_DESCRIPTOR = os.open in os.supports_dir_fd
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _NO_FOLLOW | getattr(os, "O_CLOEXEC", 0)
_SEARCH = _DIRECTORY | getattr(os, "O_PATH", 0)  # works for a parent folder that is not readable
_MOST_LINKS = 40  # the limit of the Linux kernel (source: include/linux/namei.h, MAXSYMLINKS)
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # linux/fs.h
_NO_LINK_TIMES = {errno.ENOSYS, errno.EOPNOTSUPP}
_NO_PRIVILEGE = 1314  # winerror.h, ERROR_PRIVILEGE_NOT_HELD


def _with_full_path(
    method: Callable[Concatenate[OpenDir, str, _P], _R],
) -> Callable[Concatenate[OpenDir, str, _P], _R]:
    """Decorate a method so that an OSError from it has the full path, not only the entry's name, as `filename`."""

    @functools.wraps(method)
    def wrapper(self: OpenDir, name: str, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, name, *args, **kwargs)
        except OSError as error:
            error.filename = str(self.path / name)
            raise

    return cast("Callable[Concatenate[OpenDir, str, _P], _R]", wrapper)


class OpenDir:
    """Represents one open folder; close the object, or use it in a `with` statement."""

    def __init__(self, descriptor: int | None, path: Path) -> None:
        """Take the descriptor (None on Windows) and the path, which error messages name."""
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def at(cls, path: Path) -> OpenDir:
        """Open a folder by its path; links on the path are followed only if root or this user made them.

        Raises:
            BlockedError: the path contains a link that another user made.
            OSError: the folder does not exist, or the path is not a folder.
        """
        if not _BY_DESCRIPTOR:
            real = path.resolve(strict=True)
            return cls(None, real)
        return _walk(path)

    @_with_full_path
    def enter(self, name: str) -> OpenDir:
        """Open the subfolder `name` of this folder.

        Raises:
            OSError: the name does not exist, is not a folder, or is a link (ELOOP, ENOTDIR).
        """
        if self.descriptor is None:
            path = self.path / name
            if not stat.S_ISDIR(os.lstat(path).st_mode) or link_target(path) is not None:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            return OpenDir(None, path)
        return OpenDir(os.open(name, _DIRECTORY, dir_fd=self.descriptor), self.path / name)

    def scan(self) -> list[os.DirEntry[str]]:
        """Return the entries of the folder, not sorted; call `stat` on them with follow_symlinks=False."""
        with os.scandir(self.path if self.descriptor is None else self.descriptor) as entries:
            return list(entries)

    @_with_full_path
    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """Open a file of this folder and return its descriptor; if it is a link, raise an OSError (ELOOP)."""
        return os.open(self._name(name), flags | _NO_FOLLOW | _BINARY, mode, dir_fd=self.descriptor)

    def lstat(self, name: str) -> os.stat_result | None:
        """Return the status of an entry without following a link; None if it does not exist."""
        try:
            return os.stat(self._name(name), dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def readlink(self, name: str) -> str | None:
        """Return the target of a link or junction; None if the entry is not a link or does not exist."""
        return link_target(self._name(name), self.descriptor)

    @_with_full_path
    def make(self, name: str, mode: int = 0o700) -> None:
        """Make a subfolder with the mode `mode` without the bits of the umask; by default only for this user."""
        os.mkdir(self._name(name), mode, dir_fd=self.descriptor)

    @_with_full_path
    def symlink(self, name: str, target: str) -> None:
        """Make a symbolic link with the target `target`; a junction if Windows denies the right to make links."""
        try:
            os.symlink(target, self._name(name), target_is_directory=True, dir_fd=self.descriptor)
        except OSError as error:
            if getattr(error, "winerror", None) != _NO_PRIVILEGE:
                raise
            import _winapi

            _winapi.CreateJunction(target, self._name(name))  # type: ignore[attr-defined,unused-ignore]

    @_with_full_path
    def unlink(self, name: str) -> None:
        """Delete a file or a link; a junction of Windows is deleted with `rmdir`, because it counts as a folder."""
        try:
            os.unlink(self._name(name), dir_fd=self.descriptor)
        except PermissionError:
            if self.descriptor is not None or self.readlink(name) is None:
                raise
            self.rmdir(name)

    @_with_full_path
    def rmdir(self, name: str) -> None:
        """Delete an empty subfolder."""
        os.rmdir(self._name(name), dir_fd=self.descriptor)

    @_with_full_path
    def rename(self, name: str, other: OpenDir, new: str) -> None:
        """Rename the entry `name` of this folder to `new` in the open folder `other`, which may be this folder."""
        os.rename(self._name(name), other._name(new), src_dir_fd=self.descriptor, dst_dir_fd=other.descriptor)

    def exchange(self, name: str, other: OpenDir, new: str) -> None:
        """Exchange the entry `name` of this folder and the entry `new` of `other` atomically (RENAME_EXCHANGE).

        Raises:
            OSError: the operating system or the file system does not support the exchange (ENOSYS, EINVAL), or the
                entries lie on two file systems (EXDEV).
        """
        self._renameat2(name, other, new, _RENAME_EXCHANGE)

    def rename_exclusive(self, name: str, other: OpenDir, new: str) -> None:
        """Rename an entry to a name that does not exist (renameat2 with RENAME_NOREPLACE).

        Raises:
            FileExistsError: the name exists.
            OSError: the system or the file system does not support it (ENOSYS, EINVAL).
        """
        self._renameat2(name, other, new, _RENAME_NOREPLACE)

    def _renameat2(self, name: str, other: OpenDir, new: str, flags: int) -> None:
        call = getattr(_libc(), "renameat2", None)
        if self.descriptor is None or call is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(self.path / name))
        if call(self.descriptor, os.fsencode(name), other.descriptor, os.fsencode(new), flags) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self.path / name))

    @_with_full_path
    def hardlink(self, name: str, other: OpenDir, new: str) -> None:
        """Make a hard link `new` in the open folder `other` to the file `name` of this folder."""
        os.link(
            self._name(name),
            other._name(new),
            src_dir_fd=self.descriptor,
            dst_dir_fd=other.descriptor,
            follow_symlinks=False,
        )

    @_with_full_path
    def make_special(self, name: str, status: os.stat_result) -> None:
        """Make a pipe, socket or device with the mode and device number in `status`, the status of the original."""
        os.mknod(self._name(name), status.st_mode, status.st_rdev, dir_fd=self.descriptor)

    @_with_full_path
    def copy_owner_and_times(self, name: str, status: os.stat_result, kept: KeptMetadata) -> None:
        """Give a copied link or special file the owner and times of its original, whose status is `status`.

        Metadata that `kept` does not name is not set.
        """
        has_other_owner = (
            kept.owners
            and os.chown in os.supports_dir_fd
            and (copy := self.lstat(name)) is not None
            and copy.st_uid != status.st_uid
        )
        if has_other_owner:
            os.chown(self._name(name), status.st_uid, status.st_gid, dir_fd=self.descriptor, follow_symlinks=False)
        if os.utime in os.supports_follow_symlinks:
            times = (status.st_atime_ns, status.st_mtime_ns)
            try:
                os.utime(self._name(name), ns=times, dir_fd=self.descriptor, follow_symlinks=False)
            except OSError as error:
                # Some network file systems keep the times of files, but cannot set those of links.
                if kept.mtime_ns != 0 and error.errno not in _NO_LINK_TIMES:
                    raise

    @_with_full_path
    def set_mode_and_mtime(self, name: str, mode: int, mtime_ns: int) -> None:
        """Set the mode and the modification time of a file or folder; for a link, set only the time."""
        if self.readlink(name) is None:
            os.chmod(self._name(name), mode, dir_fd=self.descriptor)
        if os.utime in os.supports_follow_symlinks:
            times = (mtime_ns, mtime_ns)
            os.utime(self._name(name), ns=times, dir_fd=self.descriptor, follow_symlinks=False)

    def sync(self) -> None:
        """Force the names of the folder's entries to the disk (fsync)."""
        if self.descriptor is not None:
            durable.sync_descriptor(self.descriptor)

    def sync_file_system(self) -> None:
        """Force all pending data of this folder's file system to the disk (syncfs); without syncfs, of all (sync).

        Raises:
            OSError: the disk reports an error (EIO, ENOSPC).
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
        """Close the descriptor of the folder."""
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
    """Return the target of a link or junction as it is stored; None if the path is not a link.

    A relative path starts at the folder with the given descriptor, or at the working folder.
    """
    try:
        return os.readlink(path, dir_fd=descriptor).removeprefix("\\\\?\\")
    except OSError:
        return None


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None


def _walk(path: Path) -> OpenDir:
    """Open a folder component by component; this function follows each link itself, after `_check_owner` accepts it."""
    todo = list(reversed(path.absolute().parts[1:]))
    real = Path(path.anchor or os.sep)
    here = os.open(real, _SEARCH)
    links = 0
    try:
        while todo:
            part = todo.pop()
            if part == os.pardir:
                # `real` contains no link, so the parent folder has the path of `real` without its last component.
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
        raise BlockedError(
            f"{path} is a link that user {owner} made, so it is not followed. Look at the link: ls -ld {path}"
        )
    if links > _MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
