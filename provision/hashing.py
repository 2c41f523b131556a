"""sha256 of files, as fast as the machine's cores allow."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from provision.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from provision.progress import Progress

_BLOCK = 1 << 20
_BATCH_BYTES = 4 << 20


def sha256(path: str | Path, block: bytearray | None = None) -> bytes:
    """The digest of one file; `block` is read into, where many files are hashed one after another.

    Raises:
        OSError: it cannot be read.
    """
    found = hashlib.sha256()
    view = memoryview(block or bytearray(_BLOCK))
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # 20,000 files: a file object costs as much again
    try:
        while size := os.readv(handle, [view]) if hasattr(os, "readv") else _read(handle, view):
            found.update(view[:size])
    finally:
        os.close(handle)
    return found.digest()


def _read(handle: int, view: memoryview) -> int:
    content = os.read(handle, len(view))
    view[: len(content)] = content
    return len(content)


def differing(files: Iterable[tuple[str, bytes]], progress: Progress = no_progress, unit: str = "files") -> list[str]:
    """The files whose content does not have the digest given with it; one that cannot be read differs.

    Hashing leaves Python's lock to the other threads, so threads use every core. Files are dealt out by size, the
    largest first, so that one large file does not keep a single core busy at the end.

    Args:
        files: (path, the digest it should have).
        progress: told the files, by the name of `unit`, and the bytes of files that are the only ones to be hashed.
        unit: what the files are called.
    """
    from concurrent.futures import ThreadPoolExecutor

    sized = sorted(((_size(path), path, digest) for path, digest in files), reverse=True)
    batches: list[list[tuple[str, bytes]]] = []
    sizes: list[int] = []
    whole = sum(size for size, _, _ in sized)
    room = 0
    for size, path, digest in sized:
        if room < size or not batches:
            batches.append([])
            sizes.append(0)
            room = _BATCH_BYTES
        batches[-1].append((path, digest))
        sizes[-1] += size
        room -= size + 4096

    def work(batch: Sequence[tuple[str, bytes]], size: int) -> list[str]:
        found = _differing(batch)
        progress(len(batch), len(sized), unit)
        if unit == "files":
            progress(size, whole)
        return found

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [path for found in pool.map(work, batches, sizes) for path in found]


def _differing(batch: Sequence[tuple[str, bytes]]) -> list[str]:
    block = bytearray(_BLOCK)
    return [path for path, digest in batch if not _is(path, digest, block)]


def _is(path: str, digest: bytes, block: bytearray) -> bool:
    try:
        return sha256(path, block) == digest
    except OSError:
        return False


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (as above)
    except OSError:
        return 0
