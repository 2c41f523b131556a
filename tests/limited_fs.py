"""Mounts a folder through FUSE with the limits of network volumes: `python limited_fs.py FOLDER MOUNT_POINT LIMIT…`.

The program speaks the kernel's protocol itself (source: include/uapi/linux/fuse.h, version 7.31), so it needs no
library. Only root can run it. Each LIMIT is a key of `LIMITS`, which says what the mounted folder then refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMITS = {
    "no-symlink": "symbolic links fail with EPERM",
    "no-hardlink": "hard links fail with EPERM",
    "no-exchange": "renameat2 with any flag, such as RENAME_EXCHANGE, fails with EINVAL",
    "no-xattr": "extended attributes fail with EOPNOTSUPP",
    "no-flock": "flock fails with ENOSYS",
    "no-fsync": "fsync fails with EINVAL",
    "no-exec": "no program in it can be executed (the mount option noexec)",
    "fixed-modes": "every entry has the mode 0777, and chmod has no effect",
    "no-chmod": "chmod fails with EPERM",
    "owner": "every entry belongs to user 1000, and chown fails with EPERM",
    "seconds": "times are rounded down to whole seconds",
    "two-seconds": "times are rounded down to even seconds",
    "100ns": "times are rounded down to units of 100 ns",
    "no-times": "setting a time (utime) has no effect",
    "caseless": "two names that differ only by case are the same name, as on Windows",
}
_OWNER = 1000
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _ATIME_NOW, _MTIME_NOW = 1, 2, 4, 8, 16, 32, 128, 256
_FLOCK_LOCKS = 1 << 10
_BIG_WRITES = 1 << 5
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_UNIT = {"seconds": 10**9, "two-seconds": 2 * 10**9, "100ns": 100}

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(code: int) -> None:
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class LimitedFileSystem:
    """Answers the kernel's FUSE requests with the files of a backing folder, and enforces the limits.

    The kernel names a file by a node number. `nodes` maps it to an O_PATH descriptor of the file in the backing folder.
    """

    def __init__(self, backing: str, limits: set[str]) -> None:
        self.limits = limits
        self.nodes: dict[int, int] = {1: os.open(backing, os.O_PATH | os.O_DIRECTORY)}
        self.by_inode: dict[tuple[int, int], int] = {}
        self.unit = next((unit for limit, unit in _UNIT.items() if limit in limits), 1)
        self.operations: dict[int, Callable[[int, bytes, int, int], bytes]] = {
            1: self.lookup, 3: self.getattr, 4: self.setattr, 5: self.readlink, 6: self.symlink, 8: self.mknod,
            9: self.mkdir, 10: self.unlink, 11: self.rmdir, 12: self.rename, 13: self.link, 14: self.open,
            15: self.read, 16: self.write, 17: self.statfs, 18: self.release, 20: self.fsync, 21: self.setxattr,
            22: self.getxattr, 23: self.listxattr, 24: self.removexattr, 25: self.done, 26: self.init, 27: self.opendir,
            28: self.readdir, 29: self.done, 30: self.fsyncdir,
            35: self.create, 45: self.rename2,
        }  # fmt: skip

    def serve(self, device: int) -> None:
        """Answer the requests that arrive at `device`, an open /dev/fuse, until the file system is unmounted."""
        while True:
            try:
                request = os.read(device, (1 << 20) + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno in {errno.EINTR, errno.ENOENT, errno.EAGAIN}:
                    continue
                raise
            _, opcode, unique, node, uid, gid = struct.unpack_from("<IIQQII", request)
            if opcode in {2, 42, 36}:  # FORGET, BATCH_FORGET and INTERRUPT have no answer
                continue
            try:
                code, answer = 0, self.operations.get(opcode, self.unsupported)(node, request[40:], uid, gid)
            except OSError as error:
                code, answer = -(error.errno or errno.EIO), b""
            with contextlib.suppress(FileNotFoundError):  # the request was interrupted
                os.write(device, struct.pack("<IiQ", 16 + len(answer), code, unique) + answer)

    def _path(self, node: int) -> str:
        return f"/proc/self/fd/{self.nodes[node]}"

    def _name(self, node: int, name: bytes) -> bytes:
        """Return the entry's name as the backing folder spells it: with `caseless`, the case may differ from `name`."""
        if "caseless" in self.limits:
            try:
                os.stat(name, dir_fd=self.nodes[node], follow_symlinks=False)
            except FileNotFoundError:
                for other in Path(self._path(node)).iterdir():
                    if other.name.casefold() == os.fsdecode(name).casefold():
                        return os.fsencode(other.name)
        return name

    def _entry(self, parent: int, name: bytes) -> bytes:
        descriptor = os.open(self._name(parent, name), os.O_PATH | os.O_NOFOLLOW, dir_fd=self.nodes[parent])
        status = os.fstat(descriptor)
        key = (status.st_dev, status.st_ino)
        node = self.by_inode.get(key)
        if node is None:
            node = self.by_inode[key] = len(self.nodes) + 1
            self.nodes[node] = descriptor
        else:
            os.close(descriptor)
        return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self._attributes(node)

    def _attributes(self, node: int) -> bytes:
        status = os.fstat(self.nodes[node])
        mode, uid, gid = status.st_mode, status.st_uid, status.st_gid
        if "fixed-modes" in self.limits and not stat.S_ISLNK(mode):
            mode = stat.S_IFMT(mode) | 0o777
        if "owner" in self.limits:
            uid = gid = _OWNER
        times = [value // self.unit * self.unit for value in (status.st_atime_ns, status.st_mtime_ns)]
        times.append(status.st_ctime_ns)
        numbers = [status.st_ino, status.st_size, status.st_blocks, *(time // 10**9 for time in times)]
        words = [*(time % 10**9 for time in times), mode, status.st_nlink, uid, gid, status.st_rdev, 4096, 0]
        return struct.pack("<6Q10I", *numbers, *words)

    def _own(self, parent: int, name: bytes, uid: int, gid: int) -> None:
        if "owner" not in self.limits and uid != os.geteuid():
            os.chown(name, uid, gid, dir_fd=self.nodes[parent], follow_symlinks=False)

    def init(self, _node: int, _body: bytes, _uid: int, _gid: int) -> bytes:
        flags = _BIG_WRITES | (_FLOCK_LOCKS if "no-flock" in self.limits else 0)
        return struct.pack("<IIIIHHIIHHI", 7, 31, 0, flags, 16, 12, 1 << 17, 1, 32, 0, 0) + bytes(28)

    def lookup(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        return self._entry(node, body.rstrip(b"\0"))

    def getattr(self, node: int, _body: bytes, _uid: int, _gid: int) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self._attributes(node)

    def setattr(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        valid, _, _, size, _, atime, mtime, _ = struct.unpack_from("<IIQQQQQQ", body)
        atime_ns, mtime_ns, _, mode, _, uid, gid = struct.unpack_from("<7I", body, 56)
        path = self._path(node)
        if valid & _MODE:
            if "no-chmod" in self.limits:
                raise PermissionError(errno.EPERM, "")
            if "fixed-modes" not in self.limits:
                Path(path).chmod(stat.S_IMODE(mode))
        if valid & (_UID | _GID):
            if "owner" in self.limits:
                raise PermissionError(errno.EPERM, "")
            os.chown(path, uid if valid & _UID else -1, gid if valid & _GID else -1)
        if valid & _SIZE:
            os.truncate(path, size)
        if valid & (_ATIME | _MTIME) and "no-times" not in self.limits:
            now = os.fstat(self.nodes[node])
            accessed = atime * 10**9 + atime_ns if valid & _ATIME else now.st_atime_ns
            modified = mtime * 10**9 + mtime_ns if valid & _MTIME else now.st_mtime_ns
            if valid & (_ATIME_NOW | _MTIME_NOW):
                os.utime(path)
            else:
                os.utime(path, ns=(accessed, modified))
        return self.getattr(node, b"", 0, 0)

    def readlink(self, node: int, _body: bytes, _uid: int, _gid: int) -> bytes:
        return os.fsencode(os.readlink("", dir_fd=self.nodes[node]))

    def symlink(self, node: int, body: bytes, uid: int, gid: int) -> bytes:
        if "no-symlink" in self.limits:
            raise PermissionError(errno.EPERM, "")
        name, target = body.rstrip(b"\0").split(b"\0")
        os.symlink(target, name, dir_fd=self.nodes[node])
        self._own(node, name, uid, gid)
        return self._entry(node, name)

    def _new_name(self, node: int, name: bytes) -> bytes:
        """Return `name`; with `caseless`, raise FileExistsError if an entry differs from it only by case."""
        if self._name(node, name) != name:
            raise FileExistsError(errno.EEXIST, "")
        return name

    def mknod(self, node: int, body: bytes, uid: int, gid: int) -> bytes:
        mode, device, _, _ = struct.unpack_from("<IIII", body)
        name = self._new_name(node, body[16:].rstrip(b"\0"))
        os.mknod(name, mode, device, dir_fd=self.nodes[node])
        self._own(node, name, uid, gid)
        return self._entry(node, name)

    def mkdir(self, node: int, body: bytes, uid: int, gid: int) -> bytes:
        mode, _ = struct.unpack_from("<II", body)
        name = self._new_name(node, body[8:].rstrip(b"\0"))
        os.mkdir(name, mode, dir_fd=self.nodes[node])
        self._own(node, name, uid, gid)
        return self._entry(node, name)

    def unlink(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        os.unlink(self._name(node, body.rstrip(b"\0")), dir_fd=self.nodes[node])
        return b""

    def rmdir(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        os.rmdir(self._name(node, body.rstrip(b"\0")), dir_fd=self.nodes[node])
        return b""

    def rename(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        (parent,) = struct.unpack_from("<Q", body)
        return self._rename(node, parent, body[8:], 0)

    def rename2(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        parent, flags, _ = struct.unpack_from("<QII", body)
        if "no-exchange" in self.limits and flags:
            raise OSError(errno.EINVAL, "")
        return self._rename(node, parent, body[16:], flags)

    def _rename(self, node: int, parent: int, names: bytes, flags: int) -> bytes:
        old, new = names.rstrip(b"\0").split(b"\0")
        descriptors = self.nodes[node], self.nodes[parent]
        old_name, new_name = self._name(node, old), self._name(parent, new)
        _checked(_libc.renameat2(descriptors[0], old_name, descriptors[1], new_name, flags))
        return b""

    def link(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        if "no-hardlink" in self.limits:
            raise PermissionError(errno.EPERM, "")
        (old,) = struct.unpack_from("<Q", body)
        name = self._new_name(node, body[8:].rstrip(b"\0"))
        os.link(self._path(old), name, dst_dir_fd=self.nodes[node], follow_symlinks=True)
        return self._entry(node, name)

    def open(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        descriptor = os.open(self._path(node), flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND))
        return struct.pack("<QII", descriptor, 0, 0)

    def create(self, node: int, body: bytes, uid: int, gid: int) -> bytes:
        flags, mode, _, _ = struct.unpack_from("<IIII", body)
        name = self._name(node, body[16:].rstrip(b"\0"))
        descriptor = os.open(name, flags & ~os.O_APPEND | os.O_CREAT, stat.S_IMODE(mode), dir_fd=self.nodes[node])
        self._own(node, name, uid, gid)
        return self._entry(node, name) + struct.pack("<QII", descriptor, 0, 0)

    def read(self, _node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        descriptor, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(descriptor, size, offset)

    def write(self, _node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        descriptor, offset, size = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(descriptor, body[40 : 40 + size], offset), 0)

    def statfs(self, node: int, _body: bytes, _uid: int, _gid: int) -> bytes:
        system = os.statvfs(self._path(node))
        numbers = (system.f_blocks, system.f_bfree, system.f_bavail, system.f_files, system.f_ffree)
        return struct.pack("<5Q4I", *numbers, system.f_bsize, 255, system.f_frsize, 0) + bytes(24)

    def release(self, _node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def fsync(self, _node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        if "no-fsync" in self.limits:
            raise OSError(errno.EINVAL, "")
        os.fsync(struct.unpack_from("<Q", body)[0])
        return b""

    def fsyncdir(self, _node: int, _body: bytes, _uid: int, _gid: int) -> bytes:
        if "no-fsync" in self.limits:
            raise OSError(errno.EINVAL, "")
        return b""

    def done(self, _node: int, _body: bytes, _uid: int, _gid: int) -> bytes:
        return b""

    def unsupported(self, _node: int, _body: bytes, _uid: int, _gid: int) -> bytes:
        raise OSError(errno.ENOSYS, "")

    def opendir(self, _node: int, _body: bytes, _uid: int, _gid: int) -> bytes:
        return struct.pack("<QII", 0, 0, 0)

    def readdir(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        answer = b""
        with os.scandir(self._path(node)) as entries:
            names = [(".", 1, 4), ("..", 1, 4), *((entry.name, entry.inode(), 0) for entry in entries)]
        for number, (text, inode, kind) in enumerate(names[offset:], start=offset + 1):
            name = os.fsencode(text)
            entry = struct.pack("<QQII", inode, number, len(name), kind) + name
            entry += bytes(-len(entry) % 8)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return answer

    def _require_xattr(self) -> None:
        if "no-xattr" in self.limits:
            raise OSError(errno.EOPNOTSUPP, "")

    def setxattr(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        self._require_xattr()
        size, flags = struct.unpack_from("<II", body)
        name, _, value = body[8:].partition(b"\0")
        os.setxattr(self._path(node), name, value[:size], flags)
        return b""

    def getxattr(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        self._require_xattr()
        return self._sized(os.getxattr(self._path(node), body[8:].rstrip(b"\0")), body)

    def listxattr(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        self._require_xattr()
        return self._sized(b"".join(os.fsencode(name) + b"\0" for name in os.listxattr(self._path(node))), body)

    def removexattr(self, node: int, body: bytes, _uid: int, _gid: int) -> bytes:
        self._require_xattr()
        os.removexattr(self._path(node), body.rstrip(b"\0"))
        return b""

    @staticmethod
    def _sized(value: bytes, body: bytes) -> bytes:
        """Return an extended attribute's value, or only its length if the request gives a buffer size of 0."""
        (size,) = struct.unpack_from("<I", body)
        if size == 0:
            return struct.pack("<II", len(value), 0)
        if len(value) > size:
            raise OSError(errno.ERANGE, "")
        return value


@contextlib.contextmanager
def mounted(backing: Path, point: Path, *limits: str) -> Iterator[None]:
    """Mount the folder `backing` at `point` by a separate process, and unmount it at the end.

    Skip the test if this system or this user cannot mount through FUSE.
    """
    import pytest

    if sys.platform != "linux" or os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("a FUSE mount needs Linux, root and /dev/fuse")
    argv = [sys.executable, __file__, str(backing), str(point), *limits]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        if server.stdout.readline() != "ready\n":
            pytest.skip(f"no right to mount through FUSE: {server.stderr.read()[-200:]}")
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", point], check=True)
            server.wait()


def main(backing: str, mount_point: str, *limits: str) -> None:
    """Mount the folder, print "ready", and serve it until it is unmounted."""
    import resource

    unknown = set(limits) - set(LIMITS)
    assert not unknown, unknown
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.umask(0)  # the kernel has applied the calling process's umask already
    device = os.open("/dev/fuse", os.O_RDWR)
    flags = _MS_NOSUID | _MS_NODEV | (_MS_NOEXEC if "no-exec" in limits else 0)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    _checked(_libc.mount(b"limited", os.fsencode(mount_point), b"fuse", flags, options))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    LimitedFileSystem(backing, set(limits)).serve(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
