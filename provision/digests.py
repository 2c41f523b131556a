"""The content hashes by which files are pinned."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typing_extensions import Self

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
