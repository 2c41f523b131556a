"""Gives one process at a time access to a file."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOR_ALL = 0o666  # the mode of an empty lock file: every user of a shared cache may lock it


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `.NAME.lock` beside a file; other processes that want it wait."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock"), mode=FOR_ALL):
        yield
