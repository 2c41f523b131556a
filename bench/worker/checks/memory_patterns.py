"""Writes patterns and addresses into most of a device's free memory, and looks whether each byte comes back."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.core.errors import SkipError
from bench.core.validation_records import Reading
from bench.worker.checks import device as checked_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.worker.checks.device import Device

if TYPE_CHECKING:
    # Called between writing and looking, with the pattern's name and the memory: tests plant a fault there.
    Between = Callable[[str, Sequence[Any]], None]

_WORD = 8  # bytes; a word is what is written and compared
# Of a card's free memory: a tenth stays for whoever else is on it. Of a host's no more than half: a card refuses what
# it does not have, a host ends some process.
_CARD_SHARE, _HOST_SHARE = 0.87, 0.5
_CARD_CHUNK, _HOST_CHUNK = 512 << 20, 64 << 20  # bytes
_TRIAL_BYTES = 64 << 20  # more than the allocators keep of what was given back, and than most caches hold
_CAUTION = 1.1
# What is written at once, and the few copies of it that are computed with: small enough for a cache.
_CARD_BLOCK, _HOST_BLOCK = 4 << 20, 1 << 20  # words
# An odd number spreads neighbours over all 64 bits, and takes no two addresses to one word: multiplying with it has an
# inverse modulo 2**64. This one is 2**64 over the golden ratio (Knuth, The Art of Computer Programming, 6.4).
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)
_ALTERNATING = 0x5555555555555555


@dataclass(frozen=True)
class Pattern:
    """What a word holds: a constant, or (None) its own address, spread over all its bits. `flipped`: every bit."""

    name: str
    constant: int | None
    flipped: bool = False


# Each bit of each word is once a one and once a zero; neighbours are alike and unlike; and a line of the address that
# is stuck shows, since every word of the memory is written before the first is looked at.
PATTERNS = (
    Pattern("own address", None),
    Pattern("own address inverted", None, flipped=True),
    Pattern("0x55", _ALTERNATING),
    Pattern("0xAA", _ALTERNATING, flipped=True),
)


def memory(device: Device, until: float, between: Between | None = None) -> Iterator[Reading]:
    """How much of the free memory holds what is written into it, and what does not.

    Args:
        device: is asked.
        until: the time (time.perf_counter) in which all has to end: as much is tested as that allows.
        between: called after each pattern was written and before it is looked at.
    """
    blank = Reading("memory", "memory", device.name, "", None)
    device.let_go()
    yield checked_device.asked(blank, partial(_tested, device, until, between or (lambda *_: None), blank))
    device.let_go()


def _tested(device: Device, until: float, between: Between, blank: Reading) -> Reading:
    free = device.free_bytes()
    if free is None:
        raise SkipError("nothing tells how much memory is free")
    share = _CARD_SHARE if device.is_card else _HOST_SHARE
    blocks = _Blocks(device)
    if free * share < blocks.bytes:
        raise SkipError(f"no more than {free} bytes are free")
    price = _price(device, blocks, until)
    device.let_go()
    # The first pattern is written as the memory is had: pages that a host finds only now may cost more than all else.
    chunks: list[Any] = []
    tested, why = 0, "the allocator gives no room for it"
    for chunk in _allocate(device, int(free * share) // blocks.bytes * blocks.bytes):
        more = len(chunk) * _WORD
        is_time = (tested + more) * price < until - time.perf_counter()
        if not (is_time and _is_written(blocks, PATTERNS[0], [chunk], until, tested // _WORD)):
            why = checked_device.NO_TIME
            break
        device.wait()
        chunks.append(chunk)
        tested += more
    if not chunks:
        raise SkipError(why)
    result = _Errors()
    whole = 0
    for pattern in PATTERNS:
        if whole and not _is_written(blocks, pattern, chunks, until):
            break
        between(pattern.name, chunks)
        if not _is_looked_at(blocks, pattern, chunks, result, until):
            break
        whole += 1
    if not whole and not result.words:
        raise SkipError(checked_device.NO_TIME)
    figures = {
        "tested_bytes": float(tested),
        "free_bytes": float(free),
        "errors": float(result.words),
        "patterns": float(whole),
    }
    return replace(blank, value=tested / free, figures=figures, fault=result.said())


@dataclass
class _Errors:
    """The words that did not come back: how many, and the first."""

    words: int = 0
    first: tuple[int, int, str] = field(default=(0, 0, ""))  # its offset in bytes, the bits that differ, the pattern

    def said(self) -> str | None:
        """In words; None where every one came back."""
        if not self.words:
            return None
        offset, bits, pattern = self.first
        named = ", ".join(str(bit) for bit in range(64) if bits >> bit & 1)
        return (
            f"words of 8 bytes that did not come back: {self.words}; the first at byte {offset} of what was tested, "
            f"its bits {named} flipped, in the pattern {pattern}"
        )


class _Blocks:
    """Makes what a block of words should hold, in memory that is used again for each."""

    def __init__(self, device: Device) -> None:
        """Allocate it."""
        self.words = _CARD_BLOCK if device.is_card else _HOST_BLOCK
        self.bytes = self.words * _WORD
        self._device = device
        torch = device.torch
        self._index = torch.arange(self.words, device=device.name, dtype=torch.int64)
        self._right = torch.empty_like(self._index)
        self._off = torch.empty_like(self._index)

    def right(self, pattern: Pattern, first: int) -> Any:
        """What the words from an address (counted in words) on should hold."""
        torch, right = self._device.torch, self._right
        if pattern.constant is not None:
            right.fill_(pattern.constant)
        else:
            torch.add(self._index, first + 1, out=right)
            right.mul_(_SPREAD)
        return right.bitwise_not_() if pattern.flipped else right

    def off(self, block: Any, right: Any) -> Any:
        """The bits in which a block differs."""
        return self._device.torch.bitwise_xor(block, right, out=self._off)


def _price(device: Device, blocks: _Blocks, until: float) -> float:
    """The seconds that a byte takes for all patterns, with the pages that a host's system has to find for it.

    Raises:
        SkipError: there is no time to find out.
    """
    price, left = 0.0, until - time.perf_counter()
    if left <= 0:
        raise SkipError(checked_device.NO_TIME)
    # A single block tells whether there is time for more of them, which tell the truth.
    for size in (blocks.bytes, blocks.bytes, _TRIAL_BYTES):
        if price * size > left / 4:
            break
        price = device.timed(partial(_trial, device, blocks, size)) / size * _CAUTION
    return price


def _trial(device: Device, blocks: _Blocks, size: int) -> None:
    chunks, found = list(_allocate(device, size)), _Errors()
    for pattern in PATTERNS:
        _is_written(blocks, pattern, chunks, math.inf)
        _is_looked_at(blocks, pattern, chunks, found, math.inf)


def _allocate(device: Device, size: int) -> Iterator[Any]:
    """Memory of that size, a chunk at a time; less, where the allocator gives no more."""
    chunk = _CARD_CHUNK if device.is_card else _HOST_CHUNK
    while size > 0:
        try:
            yield device.torch.empty(min(size, chunk) // _WORD, device=device.name, dtype=device.torch.int64)
        except (RuntimeError, MemoryError):  # torch.OutOfMemoryError is the former
            return
        size -= chunk


def _each(blocks: _Blocks, chunks: Sequence[Any], first: int = 0) -> Iterator[tuple[int, Any]]:
    """(its first word's number, a block) of all chunks, the first of which begins with that word."""
    for chunk in chunks:
        for block in chunk.split(blocks.words):
            yield first, block
            first += blocks.words


def _is_written(blocks: _Blocks, pattern: Pattern, chunks: Sequence[Any], until: float, begin: int = 0) -> bool:
    """Write a pattern everywhere. Whether there was time for it."""
    for first, block in _each(blocks, chunks, begin):
        if time.perf_counter() > until:
            return False
        block.copy_(blocks.right(pattern, first))
    return True


def _is_looked_at(blocks: _Blocks, pattern: Pattern, chunks: Sequence[Any], errors: _Errors, until: float) -> bool:
    """Compare a pattern everywhere, and note what differs. Whether there was time for it."""
    for first, block in _each(blocks, chunks):
        if time.perf_counter() > until:
            return False
        off = blocks.off(block, blocks.right(pattern, first))
        if bool(off.any()):
            # From what was read just now: a second look might find it right.
            wrong = off.nonzero().flatten()
            if not errors.words:
                place = int(wrong[0])
                errors.first = ((first + place) * _WORD, int(off[place]) & ((1 << 64) - 1), pattern.name)
            errors.words += len(wrong)
    return True
