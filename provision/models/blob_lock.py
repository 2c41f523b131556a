"""Locks a blob of the hub cache against other processes and hosts, and by huggingface_hub's own lock file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from provision.fs.file_lock import PAUSE_SECONDS, FileLock

if TYPE_CHECKING:
    from pathlib import Path


class BlobLock:
    """Locks one blob, so that two processes never download the same blob.

    Where flock works, the lock file is huggingface_hub's own, so its processes wait as well. Elsewhere they may
    download a blob a second time, under a name of their own, and put the same content in its place.
    """

    def __init__(self, path: Path) -> None:
        """Take the path of the lock file, and create the folders above it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path)

    @property
    def taken_over(self) -> list[str]:
        """Return, after `take`, which ended or expired holders it has replaced, and why."""
        return self._lock.lease.taken_over

    def take(self) -> bool:
        """Take the lock without waiting; return False if another process holds it, or may hold it."""
        return self._lock.take()

    def take_or_decide(self) -> bool:
        """Take the lock, or wait until the process that holds it is known to be alive; return whether it was taken."""
        while not self.take():
            if not self._lock.is_undecided:
                return False
            time.sleep(PAUSE_SECONDS)
        return True

    def require(self) -> None:
        """Check that this process still holds the lock.

        Raises:
            LostLockError: this process was suspended, and another one has taken over the lock.
        """
        self._lock.require()

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()
