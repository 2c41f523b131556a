"""Holds a lock file while something is done."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOR_ALL = 0o666  # an empty file: whoever shares the cache may hold it


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Read and write a file as if nobody else did: whoever comes meanwhile waits. The lock lies beside it."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock"), mode=FOR_ALL):
        yield
