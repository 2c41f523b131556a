"""Locks between processes: one that is tried, as the hub's own client has it, and one that is waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.fs.file_lock import FOR_ALL

if TYPE_CHECKING:
    from pathlib import Path


class BlobLock:
    """The lock that the hub's own client takes for a blob: nobody fetches what another fetches already."""

    def __init__(self, path: Path) -> None:
        """Take the lock's file; the folders above it are made."""
        import filelock

        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path, thread_local=False, mode=FOR_ALL)

    def take(self) -> bool:
        """Whether it is ours now."""
        import filelock

        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            return False
        return True

    def release(self) -> None:
        """Let others have it."""
        self._lock.release()
