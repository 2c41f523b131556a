"""Stores the received bytes of an incomplete download in a file, together with their hashes.

The bytes are deleted only if a hash proves that they are wrong.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from provision.core import hashing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from provision.core.hashing import Hash

if TYPE_CHECKING:
    Block = bytes | memoryview
if TYPE_CHECKING:
    Progress = Callable[[int], None]


class TooLargeError(Exception):
    """Report that a source sends more than `most` bytes, the largest possible size of the file."""

    def __init__(self, most: int) -> None:
        """Store the limit in bytes."""
        super().__init__(most)
        self.most = most


class ContentMismatchError(Exception):
    """Report that a source sent a whole file that does not begin with the bytes of the partial file, or is shorter.

    `size`: the size of the received file in bytes.
    `mismatch`: the first hash of the received file that differs from its pin, as text. None if the received file has
    the pinned hashes; then the bytes of the partial file are wrong.
    """

    def __init__(self, size: int, mismatch: str | None) -> None:
        """Store the values that the class describes."""
        super().__init__(mismatch)
        self.size = size
        self.mismatch = mismatch


@dataclass(frozen=True)
class PartialState:
    """Hold the state of a partial file at one moment.

    `have`: its size in bytes. `digests`: {kind of hash: the hash object}. `sources`: the names of the sources of its
    bytes.
    """

    have: int
    digests: Mapping[str, Hash]
    sources: frozenset[str]


class PartialFile:
    """Represents the file that holds the received bytes of a download, and the hashes of these bytes.

    `have` is the number of bytes in the file, and `sources` has the names of the sources that sent them.

    Args:
        path: the partial file; it need not exist.
        pins: {kind of hash, as for `hashing.content_hash`: the allowed digests in hex}; one of each kind must match.
        size: the pinned size of the whole file in bytes, or None; the kind git_sha1 requires it.
    """

    def __init__(self, path: Path, pins: Mapping[str, Collection[str]], size: int | None) -> None:
        """Hash the bytes that an earlier run has left in the file; delete the file if it is larger than `size`."""
        if path.is_symlink():  # another user may have made the link, so that its target would be overwritten
            path.unlink()
        self.path = path
        self.pins = pins
        self.size = size
        self.sources: set[str] = set()
        self.have = path.stat().st_size if path.exists() else 0
        self.digests = self._new_digests()
        if size is not None and self.have > size:
            self.restart()
        elif self.have:
            self.sources.add("an earlier run")
            for digest in self.digests.values():
                hashing.add_file(path, digest)

    @property
    def has_pinned_size(self) -> bool:
        """Return whether the file has the pinned size; its content may still be wrong."""
        return self.size is not None and self.have == self.size and self.path.exists()

    @property
    def mismatch(self) -> str | None:
        """Return, as text, the first hash of the present bytes that differs from its pin; None if all match."""
        return self._mismatch_of(self.digests)

    def restart(self) -> None:
        """Delete the file, so that the download starts from zero bytes."""
        self.path.unlink(missing_ok=True)
        self.have = 0
        self.sources.clear()
        self.digests = self._new_digests()

    def checkpoint(self) -> PartialState:
        """Return the current state, which `roll_back` can restore."""
        return PartialState(
            self.have, {kind: digest.copy() for kind, digest in self.digests.items()}, frozenset(self.sources)
        )

    def roll_back(self, state: PartialState) -> None:
        """Delete the bytes that were added after `checkpoint` returned this state."""
        if not state.have:
            self.restart()
            return
        os.truncate(self.path, state.have)
        self.have, self.digests, self.sources = state.have, dict(state.digests), set(state.sources)

    def add(self, blocks: Iterator[Block], source: str, progress: Progress, most: int) -> None:
        """Append received blocks to the file, and hash them.

        Args:
            blocks: the blocks in their order.
            source: the name of the source that sends them.
            progress: called with the number of bytes in each block.
            most: the largest possible size of the whole file in bytes.

        Raises:
            TooLargeError: with the next block the file would be larger than `most`.
        """
        with open(self.path, "ab", opener=_open_unless_link) as file:
            for block in blocks:
                if self.have + len(block) > most:
                    raise TooLargeError(most)
                file.write(block)
                self.sources.add(source)
                self.have += _hash_block(self.digests, block)
                progress(len(block))

    def skip_present(self, blocks: Iterator[Block], progress: Progress, most: int) -> Iterator[Block]:
        """Skip the bytes of a whole file that the partial file has already, and yield the blocks after them.

        The skipped bytes are hashed and compared with the partial file.

        Args:
            blocks: the blocks of the whole file, from its first byte.
            progress: called with 0 for each skipped block; an exception that it raises ends the download.
            most: the largest possible size of the file in bytes.

        Raises:
            TooLargeError: the source sends other bytes than the partial file has, and more than `most` in total.
            ContentMismatchError: the whole file begins with other bytes than the partial file has, or is shorter. It
                was received and hashed to its end.
        """
        received, count, blocks = self._new_digests(), 0, iter(blocks)
        for block in blocks:
            present = block[: self.have - count]
            count += _hash_block(received, present)
            progress(0)  # skipped bytes do not count as progress, but the callback can raise to end the download
            if count < self.have:
                continue
            rest = block[len(present) :]
            if all(received[kind].hexdigest() == digest.hexdigest() for kind, digest in self.digests.items()):
                yield rest
                yield from blocks
                return
            for other in chain([rest], blocks):
                count += _hash_block(received, other)
                progress(0)
                if count > most:
                    raise TooLargeError(most)
        raise ContentMismatchError(count, self._mismatch_of(received))

    def _new_digests(self) -> dict[str, Hash]:
        return {kind: hashing.content_hash(kind, self.size or 0) for kind in self.pins}

    def _mismatch_of(self, digests: Mapping[str, Hash]) -> str | None:
        for kind, pins in self.pins.items():
            digest = digests[kind].hexdigest()
            if digest not in pins:
                pinned = f"is {next(iter(pins))}" if len(pins) == 1 else f"is one of {len(pins)} others"
                return f"content with {kind} {digest}, but the pinned {kind} {pinned}"
        return None


def _hash_block(digests: Mapping[str, Hash], block: Block) -> int:
    """Add a block to each hash, and return the number of its bytes."""
    for digest in digests.values():
        digest.update(block)
    return len(block)


def _open_unless_link(path: str, flags: int) -> int:
    """Return the file descriptor of an opened path; OSError if the path is a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
