"""Locks a blob of the hub cache against other processes, as huggingface_hub does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.fs.file_lock import FOR_ALL

if TYPE_CHECKING:
    from pathlib import Path


class BlobLock:
    """Locks one blob with huggingface_hub's own lock file, so that two processes never download the same blob."""

    def __init__(self, path: Path) -> None:
        """Take the path of the lock file, and create the folders above it."""
        import filelock

        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path, thread_local=False, mode=FOR_ALL)

    def take(self) -> bool:
        """Take the lock without waiting; return False if another process holds it."""
        import filelock

        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            return False
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()
