"""Computes the content hashes by which files are pinned."""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING, Protocol

from provision.core.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from provision.core.progress import Progress

_BLOCK = 1 << 20
_BLOB = re.compile(r"(?:^|/)blobs/([0-9a-f]{64}|[0-9a-f]{40})$")


class Hash(Protocol):
    """Describe the methods of hashlib's hash objects that firstlight uses."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add bytes to the hashed content."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far, in hexadecimal."""

    def copy(self) -> Self:
        """Return an independent hash object with the same state."""


def content_hash(kind: str, size: int) -> Hash:
    """Return a new hash object of one of the two kinds by which a hub identifies the content of files.

    Args:
        kind: "sha256", or "git_sha1" (git's blob hash: sha1 over "blob SIZE", a zero byte and the content).
        size: the file's size in bytes; only git's hash needs it.
    """
    if kind == "sha256":
        return hashlib.sha256()
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b"blob %d\0" % size)
    return digest


def named_hash(path: str) -> tuple[str, str] | None:
    """Return (kind, hash) from the path of a blob in a hub cache; None if the path is not that of a blob.

    The name of a blob is the hash of its content: "sha256" for a large file, "git_sha1" for a small one.
    """
    match = _BLOB.search(path)
    return None if match is None else ({40: "git_sha1", 64: "sha256"}[len(match[1])], match[1])


def hash_file(path: Path, kind: str, progress: Callable[[int], None] | None = None) -> str:
    """Return the content hash of a file on disk, in hexadecimal.

    Args:
        path: the file.
        kind: "sha256" or "git_sha1", as in `content_hash`.
        progress: called after each block with the number of its bytes.
    """
    digest = content_hash(kind, path.stat().st_size)
    add_file(path, digest, progress)
    return digest.hexdigest()


def add_file(path: Path, digest: Hash, progress: Callable[[int], None] | None = None) -> None:
    """Add the content of a file to a hash, in blocks of 1 MiB.

    `progress` is called after each block with the number of its bytes.
    """
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            if progress is not None:
                progress(count)


_BLOCK = 1 << 20
_BATCH_BYTES = 4 << 20


def sha256(path: str | Path, block: bytearray | None = None) -> bytes:
    """Return the sha256 digest of a file.

    Args:
        path: the file.
        block: a buffer to read into, so that many files can be hashed with one allocation.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    view = memoryview(block or bytearray(_BLOCK))
    # A descriptor, since a file object for each of 20,000 files would double the cost.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        while size := os.readv(handle, [view]) if hasattr(os, "readv") else _read(handle, view):
            digest.update(view[:size])
    finally:
        os.close(handle)
    return digest.digest()


def _read(handle: int, view: memoryview) -> int:
    content = os.read(handle, len(view))
    view[: len(content)] = content
    return len(content)


def mismatched_files(
    files: Iterable[tuple[str, bytes]], progress: Progress = no_progress, unit: str = "files"
) -> list[str]:
    """Return the paths of the files that cannot be read, or whose sha256 digest differs from the expected digest.

    hashlib releases Python's global interpreter lock, so threads use every core. The largest files are hashed first, so
    that all cores are busy until the end.

    Args:
        files: pairs of (path, expected sha256 digest).
        progress: called with the count of hashed files since the last call, the number of all files, and `unit`. If
            `unit` is "files", it is also called with the count of hashed bytes and the size of all files.
        unit: the word for the files in progress reports.
    """
    from concurrent.futures import ThreadPoolExecutor

    sized = sorted(((_size(path), path, digest) for path, digest in files), reverse=True)
    batches: list[list[tuple[str, bytes]]] = []
    sizes: list[int] = []
    total = sum(size for size, _, _ in sized)
    room = 0
    for size, path, digest in sized:
        if room < size or not batches:
            batches.append([])
            sizes.append(0)
            room = _BATCH_BYTES
        batches[-1].append((path, digest))
        sizes[-1] += size
        room -= size + 4096

    def check_batch(batch: Sequence[tuple[str, bytes]], size: int) -> list[str]:
        paths = _mismatched_in(batch)
        progress(len(batch), len(sized), unit)
        if unit == "files":
            progress(size, total)
        return paths

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [path for paths in pool.map(check_batch, batches, sizes) for path in paths]


def _mismatched_in(batch: Sequence[tuple[str, bytes]]) -> list[str]:
    block = bytearray(_BLOCK)
    return [path for path, digest in batch if not _has_digest(path, digest, block)]


def _has_digest(path: str, digest: bytes, block: bytearray) -> bool:
    try:
        return sha256(path, block) == digest
    except OSError:
        return False


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (a Path object for each of 20,000 files would cost time)
    except OSError:
        return 0
