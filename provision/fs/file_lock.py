"""Gives one process at a time access to a file, also where several hosts share it and flock does not work there."""

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

FOR_ALL = 0o666  # the mode of an empty lock file: every user of a shared cache may lock it
PAUSE_SECONDS = 0.2  # between two attempts to take a lock


class FileLock:
    """Locks a file against processes of this host by flock, and of all hosts by a lease.

    The lease is needed even where flock works: some mounts apply it within one host only (NFS with `nolock` or
    `local_lock`, many FUSE file systems), and of two hosts one may mount the volume without it.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = steady_clock, *, has_older_marker: bool = False
    ) -> None:
        """Take the path of the lock file.

        Args:
            path: the lock file, in an existing folder. It stays empty, and remains after the release.
            clock: returns seconds; tests replace it.
            has_older_marker: a lock file that is not empty is a claim of an older version.
        """
        self.path = path
        self.lease = Lease(path, clock, path if has_older_marker else None)
        self.is_undecided = True
        self._flock: filelock.BaseFileLock | None = None

    def take(self) -> bool:
        """Take the lock without waiting; return False if another process may hold it.

        Then `is_undecided` is set if nothing proves that the other process is alive; call `take` again, until it is
        known to be alive or its lease has expired.

        Raises:
            OSError: the lock file or the claim of the lease cannot be created.
        """
        import filelock

        if not self.lease.is_free():  # looked at first: a process that only waits never holds flock, not even shortly
            self.is_undecided = self.lease.is_undecided
            return False
        if has_flock(self.path.parent):
            # thread_local: another thread may release the lock.
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
            LostLockError: this process was suspended, and another one has taken over the lock.
        """
        self.lease.require()

    def release(self) -> None:
        """Release the lock."""
        self.lease.release()
        self._release_flock()

    def _release_flock(self) -> None:
        if self._flock is not None:
            self._flock.release()
            self._flock = None


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `.NAME.lock` beside a file; other processes that want it wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    while not lock.take():
        time.sleep(PAUSE_SECONDS)
    try:
        yield
    finally:
        lock.release()


def has_flock(folder: Path) -> bool:
    """Return whether files of a folder can be locked by flock.

    It is tried with a file of its own. filelock would try it with the lock file, and where flock is missing, it would
    take the lock file that a host with flock has left for a held lock.

    Raises:
        OSError: no file can be created in the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows has another call, on every file system
        return True
    with tempfile.NamedTemporaryFile(prefix=".flock-", dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP, by file system
            return False
    return True
