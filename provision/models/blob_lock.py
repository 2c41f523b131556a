"""Locks a blob of the hub cache, so that no other process on any host downloads or removes the blob meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from provision.fs.file_lock import PAUSE_SECONDS, FileLock

if TYPE_CHECKING:
    from pathlib import Path


class BlobLock:
    """Locks one blob, so that two processes of firstlight never download the same blob at the same time.

    Where flock works, the lock file is the one of huggingface_hub, so programs with huggingface_hub wait as well.
    Elsewhere such a program may download the blob a second time, under a temporary name, and replace the blob by the
    same content.
    """

    def __init__(self, path: Path) -> None:
        """Store the path of the lock file, and create the folder that contains it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path)

    @property
    def taken_over(self) -> list[str]:
        """Return a text for each earlier holder of the lock that `take` has replaced, with the reason.

        Such a holder has ended, or its lease has expired.
        """
        return self._lock.lease.taken_over

    def take(self) -> bool:
        """Take the lock without waiting; return False if another process holds the lock or may hold it."""
        return self._lock.take()

    def take_or_decide(self) -> bool:
        """Take the lock; if another process may hold it, wait until that process is known to be alive or dead.

        Returns:
            True if the lock was taken; False if a live process holds it.
        """
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
