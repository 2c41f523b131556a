"""Holds a partial download; its bytes are kept until they are proven wrong."""

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
    """Report that a source sends more than the `most` bytes that the file can have."""

    def __init__(self, most: int) -> None:
        """Take the limit in bytes."""
        super().__init__(most)
        self.most = most


class ContentMismatchError(Exception):
    """Report that a whole file was received that does not begin with the bytes on disk, or is shorter.

    `size` is its size in bytes, and `wrong` describes its wrong hash. `wrong` is None if the received file is the
    pinned one; then the bytes on disk are wrong.
    """

    def __init__(self, size: int, wrong: str | None) -> None:
        """Take the size in bytes, and the description of the wrong hash or None."""
        super().__init__(wrong)
        self.size = size
        self.wrong = wrong


@dataclass(frozen=True)
class PartialState:
    """Hold the size, the hashes and the sources of a partial file at one moment."""

    have: int
    digests: Mapping[str, Hash]
    sources: frozenset[str]


class PartialFile:
    """Represents the bytes on disk and their hashes.

    Args:
        path: the partial file; bytes of an earlier run are hashed first.
        pins: {kind of `hashing.content_hash`: the pinned digests, of which one must match}.
        size: the pinned size of the whole file in bytes, or None; git's hash needs it.
    """

    def __init__(self, path: Path, pins: Mapping[str, Collection[str]], size: int | None) -> None:
        """Open the partial file and hash the bytes that an earlier run has left."""
        if path.is_symlink():  # another user may have made the link to have its target overwritten
            path.unlink()
        self.path = path
        self.pins = pins
        self.size = size
        self.sources: set[str] = set()
        self.have = path.stat().st_size if path.exists() else 0
        self.digests = self._fresh()
        if size is not None and self.have > size:
            self.restart()
        elif self.have:
            self.sources.add("an earlier run")
            for digest in self.digests.values():
                hashing.add_file(path, digest)

    @property
    def is_whole(self) -> bool:
        """Return whether the file has its pinned size, whatever its content."""
        return self.size is not None and self.have == self.size and self.path.exists()

    @property
    def wrong(self) -> str | None:
        """Return a description of the first hash that differs from its pin, or None if all match."""
        return self._wrong(self.digests)

    def restart(self) -> None:
        """Delete the file and start from zero bytes."""
        self.path.unlink(missing_ok=True)
        self.have = 0
        self.sources.clear()
        self.digests = self._fresh()

    def checkpoint(self) -> PartialState:
        """Return the current state, to which `roll_back` can return."""
        return PartialState(
            self.have, {kind: digest.copy() for kind, digest in self.digests.items()}, frozenset(self.sources)
        )

    def roll_back(self, state: PartialState) -> None:
        """Delete the bytes that were added after a checkpoint."""
        if not state.have:
            self.restart()
            return
        os.truncate(self.path, state.have)
        self.have, self.digests, self.sources = state.have, dict(state.digests), set(state.sources)

    def add(self, blocks: Iterator[Block], source: str, progress: Progress, most: int) -> None:
        """Append blocks up to a limit.

        Args:
            blocks: the blocks in their order.
            source: the name of the source that sends them.
            progress: called with the bytes of each block.
            most: the largest possible size of the file in bytes.

        Raises:
            TooLargeError: the source sends more.
        """
        with open(self.path, "ab", opener=_no_link) as file:
            for block in blocks:
                if self.have + len(block) > most:
                    raise TooLargeError(most)
                file.write(block)
                self.sources.add(source)
                self.have += _add(self.digests, block)
                progress(len(block))

    def skip_present(self, blocks: Iterator[Block], progress: Progress, most: int) -> Iterator[Block]:
        """Yield the blocks of a whole file that follow the bytes on disk, if the file begins with those bytes.

        Raises:
            TooLargeError: the source sends more than `most` bytes, the largest possible size of the file.
            ContentMismatchError: the file begins with other bytes, or is shorter; it was hashed to its end.
        """
        received, count, blocks = self._fresh(), 0, iter(blocks)
        for block in blocks:
            present = block[: self.have - count]
            count += _add(received, present)
            progress(0)  # skipped bytes do not count, but the callback can raise to end the download
            if count < self.have:
                continue
            rest = block[len(present) :]
            if all(received[kind].hexdigest() == digest.hexdigest() for kind, digest in self.digests.items()):
                yield rest
                yield from blocks
                return
            for other in chain([rest], blocks):
                count += _add(received, other)
                progress(0)
                if count > most:
                    raise TooLargeError(most)
        raise ContentMismatchError(count, self._wrong(received))

    def _fresh(self) -> dict[str, Hash]:
        return {kind: hashing.content_hash(kind, self.size or 0) for kind in self.pins}

    def _wrong(self, digests: Mapping[str, Hash]) -> str | None:
        for kind, pins in self.pins.items():
            digest = digests[kind].hexdigest()
            if digest not in pins:
                pinned = next(iter(pins)) if len(pins) == 1 else f"one of {len(pins)}"
                return f"content with {kind} {digest}, pinned is {pinned}"
        return None


def _add(digests: Mapping[str, Hash], block: Block) -> int:
    for digest in digests.values():
        digest.update(block)
    return len(block)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
