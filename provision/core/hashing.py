"""The content hashes by which files are pinned."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Protocol

from provision.core.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from provision.core.progress import Progress

_BLOCK = 1 << 20


class Hash(Protocol):
    """What hashlib's objects offer."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digest so far."""

    def copy(self) -> Self:
        """Another one that has seen the same bytes."""


def content_hash(kind: str, size: int) -> Hash:
    """A fresh hash of a kind that a hub pins.

    Args:
        kind: "sha256", or "git_sha1" (git's blob hash: sha1 over "blob SIZE", a zero byte and the content).
        size: the file's bytes; only git's hash needs it.
    """
    if kind == "sha256":
        return hashlib.sha256()
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b"blob %d\0" % size)
    return digest


def hash_file(path: Path, kind: str, progress: Callable[[int], None] | None = None) -> str:
    """The content hash of a file on disk, in a kind of `content_hash`."""
    digest = content_hash(kind, path.stat().st_size)
    add_file(path, digest, progress)
    return digest.hexdigest()


def add_file(path: Path, digest: Hash, progress: Callable[[int], None] | None = None) -> None:
    """Hash a file on disk in blocks of one size, whatever the file's is; `progress` is told the bytes."""
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            if progress is not None:
                progress(count)


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
