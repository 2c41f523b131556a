"""A file that arrives, or has arrived in part: nothing of it is given up unless it is proven wrong."""

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
    """More arrives than the `most` bytes that the file can have."""

    def __init__(self, most: int) -> None:
        """Take the bytes."""
        super().__init__(most)
        self.most = most


class ContentMismatchError(Exception):
    """A whole file arrived that begins otherwise than what is here, or is shorter: its `size`, and what is `wrong`.

    `wrong` is None where it is the pinned file: then what is here is no part of it.
    """

    def __init__(self, size: int, wrong: str | None) -> None:
        """Take what was seen."""
        super().__init__(wrong)
        self.size = size
        self.wrong = wrong


@dataclass(frozen=True)
class PartialState:
    """How far a partial was."""

    have: int
    digests: Mapping[str, Hash]
    givers: frozenset[str]


class PartialFile:
    """The bytes on disk, and the digests of them. A stored one is hashed before it is added to.

    Args:
        path: where it lies.
        pins: {kind of `hashing.content_hash`: the digests that are right}.
        size: the whole file's bytes where they are pinned; git's hash needs them.
    """

    def __init__(self, path: Path, pins: Mapping[str, Collection[str]], size: int | None) -> None:
        """Take what an earlier run has left."""
        if path.is_symlink():  # somebody else's: whatever it leads to is not ours to write
            path.unlink()
        self.path = path
        self.pins = pins
        self.size = size
        self.givers: set[str] = set()
        self.have = path.stat().st_size if path.exists() else 0
        self.digests = self._fresh()
        if size is not None and self.have > size:
            self.restart()
        elif self.have:
            self.givers.add("an earlier run")
            for digest in self.digests.values():
                hashing.add_file(path, digest)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are here, right or wrong."""
        return self.size is not None and self.have == self.size and self.path.exists()

    @property
    def wrong(self) -> str | None:
        """Which hash of what is here is not a pinned one, or None."""
        return self._wrong(self.digests)

    def restart(self) -> None:
        """Forget every byte."""
        self.path.unlink(missing_ok=True)
        self.have = 0
        self.givers.clear()
        self.digests = self._fresh()

    def mark(self) -> PartialState:
        """What `back_to` goes back to."""
        return PartialState(
            self.have, {kind: digest.copy() for kind, digest in self.digests.items()}, frozenset(self.givers)
        )

    def back_to(self, mark: PartialState) -> None:
        """Forget what has arrived since."""
        if not mark.have:
            self.restart()
            return
        os.truncate(self.path, mark.have)
        self.have, self.digests, self.givers = mark.have, dict(mark.digests), set(mark.givers)

    def add(self, blocks: Iterator[Block], source: str, progress: Progress, most: int) -> None:
        """Append what arrives, and nothing beyond the `most` bytes that the file can have.

        Raises:
            TooLargeError: more arrives.
        """
        with open(self.path, "ab", opener=_no_link) as file:
            for block in blocks:
                if self.have + len(block) > most:
                    raise TooLargeError(most)
                file.write(block)
                self.givers.add(source)
                self.have += _add(self.digests, block)
                progress(len(block))

    def rest_of(self, blocks: Iterator[Block], progress: Progress, most: int) -> Iterator[Block]:
        """Of a whole file that arrives, what is not here yet; nothing where it begins otherwise.

        Raises:
            TooLargeError: more arrives than the `most` bytes that the file can have.
            ContentMismatchError: it begins otherwise, or is shorter; it was hashed to its end.
        """
        seen, count, blocks = self._fresh(), 0, iter(blocks)
        for block in blocks:
            passed = block[: self.have - count]
            count += _add(seen, passed)
            progress(0)  # nothing that is kept, but whoever wants it to end may say so
            if count < self.have:
                continue
            after = block[len(passed) :]
            if all(seen[kind].hexdigest() == digest.hexdigest() for kind, digest in self.digests.items()):
                yield after
                yield from blocks
                return
            for other in chain([after], blocks):
                count += _add(seen, other)
                progress(0)
                if count > most:
                    raise TooLargeError(most)
        raise ContentMismatchError(count, self._wrong(seen))

    def _fresh(self) -> dict[str, Hash]:
        return {kind: hashing.content_hash(kind, self.size or 0) for kind in self.pins}

    def _wrong(self, found: Mapping[str, Hash]) -> str | None:
        for kind, right in self.pins.items():
            digest = found[kind].hexdigest()
            if digest not in right:
                pinned = next(iter(right)) if len(right) == 1 else f"one of {len(right)}"
                return f"content with {kind} {digest}, pinned is {pinned}"
        return None


def _add(found: Mapping[str, Hash], block: Block) -> int:
    for digest in found.values():
        digest.update(block)
    return len(block)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
