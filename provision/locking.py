"""Locks between processes: one that is tried, as the hub's own client has it, and one that is waited for."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FOR_ALL = 0o666  # an empty file: whoever shares the cache may hold it


class BlobLock:
    """The lock that the hub's own client takes for a blob: nobody fetches what another fetches already."""

    def __init__(self, path: Path) -> None:
        """Take the lock's file; the folders above it are made."""
        import filelock

        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path, thread_local=False, mode=_FOR_ALL)

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


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Read and write a file as if nobody else did: whoever comes meanwhile waits. The lock lies beside it."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock"), mode=_FOR_ALL):
        yield
