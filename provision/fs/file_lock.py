"""Locks a file for one process at a time, also if several hosts share the file and flock does not work between them."""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from provision.fs.lease import Lease, steady_clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import filelock

FOR_ALL = 0o666  # the mode of an empty lock file, so that every user of a shared cache can lock it
PAUSE_SECONDS = 0.2  # between two attempts to take a lock


class FileLock:
    """Locks a file against other processes of this host by flock, and against processes of all hosts by a lease.

    The lease is needed even if flock works. Some mounts apply flock within one host only (NFS with `nolock` or
    `local_lock`, many FUSE file systems), and another host may mount the volume without flock.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = steady_clock, *, has_older_marker: bool = False
    ) -> None:
        """Take the path of the lock file.

        Args:
            path: the lock file, in an existing folder. It stays empty, and remains after the release.
            clock: returns seconds; tests replace it.
            has_older_marker: treat a lock file that is not empty as a lock that an older version of firstlight holds.
        """
        self.path = path
        self.lease = Lease(path, clock, path if has_older_marker else None)
        self.is_undecided = True
        self._flock: filelock.BaseFileLock | None = None

    def take(self) -> bool:
        """Take the lock without waiting; return False if another process may hold it.

        After False, `is_undecided` is True if nothing proves that the other process is alive. Repeat `take` until
        `is_undecided` is False (the other process is alive) or `take` returns True (its lease has expired).

        Raises:
            OSError: the lock file or the claim of the lease cannot be created.
        """
        import filelock

        if not self.lease.is_free():  # checked before flock, so that a waiting process never holds flock, even briefly
            self.is_undecided = self.lease.is_undecided
            return False
        if has_flock(self.path.parent):
            # thread_local=False: another thread may release the lock.
            flock = filelock.FileLock(self.path, timeout=0, thread_local=False, mode=FOR_ALL)
            try:
                flock.acquire()
            except filelock.Timeout:
                self.is_undecided = False
                return False
            self._flock = flock
        is_taken = False
        try:
            is_taken = self.lease.take()
        finally:
            self.is_undecided = self.lease.is_undecided
            if not is_taken:
                self._release_flock()
        return is_taken

    def require(self) -> None:
        """Check that this process still holds the lock.

        Raises:
            LostLockError: this process was suspended or could not write, and another process has taken over the lock
                or may do so now.
        """
        self.lease.require()

    def release(self) -> None:
        """Release the lock; the lock file remains."""
        self.lease.release()
        self._release_flock()

    def _release_flock(self) -> None:
        if self._flock is not None:
            self._flock.release()
            self._flock = None


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock for a file during a `with` block; wait, without a limit, while another process holds it.

    The lock file is `.NAME.lock` in the folder of the file `path`, which has the name NAME.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    while not lock.take():
        time.sleep(PAUSE_SECONDS)
    try:
        yield
    finally:
        lock.release()


def has_flock(folder: Path) -> bool:
    """Return whether files in a folder can be locked by flock.

    The test locks a temporary file. filelock itself would test flock with the lock file. If flock does not work, it
    would then treat a lock file that another host has left as a held lock.

    Raises:
        OSError: no file can be created in the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows has another call, which works on all its file systems
        return True
    with tempfile.NamedTemporaryFile(prefix=".flock-", dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # ENOSYS, ENOLCK or EOPNOTSUPP, depending on the file system
            return False
    return True
