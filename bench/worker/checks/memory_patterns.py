"""Test most of a device's free memory: write patterns and addresses, and check that each byte is read back."""

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
    # Called between writing and checking, with the pattern's name and the memory, so that tests can plant a fault.
    Between = Callable[[str, Sequence[Any]], None]

_WORD = 8  # bytes of a word, the unit that is written and compared
# Shares of the free memory. On a card a tenth stays for other processes. On a host at most half is used: a card rejects
# an allocation that is too large, but a host kills some process.
_CARD_SHARE, _HOST_SHARE = 0.87, 0.5
_CARD_CHUNK, _HOST_CHUNK = 512 << 20, 64 << 20  # bytes
_TRIAL_BYTES = 64 << 20  # more than allocators cache, and more than most caches hold
_CAUTION = 1.1
# The block that is written at once; it and its few copies fit in a cache.
_CARD_BLOCK, _HOST_BLOCK = 4 << 20, 1 << 20  # words
# Multiplying by this odd number spreads neighbouring addresses over all 64 bits and maps no two to one word, since it
# has an inverse modulo 2**64. It is 2**64 over the golden ratio (Knuth, The Art of Computer Programming, 6.4).
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)
_ALTERNATING = 0x5555555555555555


@dataclass(frozen=True)
class Pattern:
    """Describe the content of a word: a constant, or (None) its own spread address. `flipped`: all bits inverted."""

    name: str
    constant: int | None
    flipped: bool = False


# Each bit of each word is once a one and once a zero; neighbouring bits are once equal and once different. A stuck
# address line is found, since every word of the memory is written before the first is checked.
PATTERNS = (
    Pattern("own address", None),
    Pattern("own address inverted", None, flipped=True),
    Pattern("0x55", _ALTERNATING),
    Pattern("0xAA", _ALTERNATING, flipped=True),
)


def memory(device: Device, until: float, between: Between | None = None) -> Iterator[Reading]:
    """Yield one reading: the tested share of the free memory, and the words that were read back wrong.

    Args:
        device: the device.
        until: the time (time.perf_counter) by which all has to end; it limits how much is tested.
        between: called after each pattern was written and before it is checked.
    """
    blank = Reading("memory", "memory", device.name, "", None)
    device.let_go()
    yield checked_device.guarded(blank, partial(_test_patterns, device, until, between or (lambda *_: None), blank))
    device.let_go()


def _test_patterns(device: Device, until: float, between: Between, blank: Reading) -> Reading:
    free = device.free_bytes()
    if free is None:
        raise SkipError("the amount of free memory is unknown")
    share = _CARD_SHARE if device.is_card else _HOST_SHARE
    blocks = _Blocks(device)
    if free * share < blocks.bytes:
        raise SkipError(f"only {free} bytes are free")
    price = _price(device, blocks, until)
    device.let_go()
    # The first pattern is written as memory is allocated: new pages of a host may cost more than all the rest.
    chunks: list[Any] = []
    tested, reason = 0, "the allocator returned no memory"
    for chunk in _allocate(device, int(free * share) // blocks.bytes * blocks.bytes):
        more = len(chunk) * _WORD
        is_time = (tested + more) * price < until - time.perf_counter()
        if not (is_time and _is_written(blocks, PATTERNS[0], [chunk], until, tested // _WORD)):
            reason = checked_device.NO_TIME
            break
        device.wait()
        chunks.append(chunk)
        tested += more
    if not chunks:
        raise SkipError(reason)
    result = _Errors()
    complete = 0
    for pattern in PATTERNS:
        if complete and not _is_written(blocks, pattern, chunks, until):
            break
        between(pattern.name, chunks)
        if not _is_checked(blocks, pattern, chunks, result, until):
            break
        complete += 1
    if not complete and not result.words:
        raise SkipError(checked_device.NO_TIME)
    figures = {
        "tested_bytes": float(tested),
        "free_bytes": float(free),
        "errors": float(result.words),
        "patterns": float(complete),
    }
    return replace(blank, value=tested / free, figures=figures, fault=result.fault())


@dataclass
class _Errors:
    """Count the words that were read back wrong, and describe the first."""

    words: int = 0
    first: tuple[int, int, str] = field(default=(0, 0, ""))  # offset in bytes, the differing bits, the pattern

    def fault(self) -> str | None:
        """Return the fault in words; None where every word was right."""
        if not self.words:
            return None
        offset, bits, pattern = self.first
        named = ", ".join(str(bit) for bit in range(64) if bits >> bit & 1)
        return (
            f"wrong words of 8 bytes: {self.words}; the first is at byte {offset} of the tested memory, bits {named} "
            f"flipped, pattern: {pattern}"
        )


class _Blocks:
    """Compute the expected content of a block of words, in memory that all blocks share."""

    def __init__(self, device: Device) -> None:
        """Allocate the shared memory."""
        self.words = _CARD_BLOCK if device.is_card else _HOST_BLOCK
        self.bytes = self.words * _WORD
        self._device = device
        torch = device.torch
        self._index = torch.arange(self.words, device=device.name, dtype=torch.int64)
        self._expected = torch.empty_like(self._index)
        self._difference = torch.empty_like(self._index)

    def expected(self, pattern: Pattern, first: int) -> Any:
        """Return the expected words from an address (counted in words) on."""
        torch, expected = self._device.torch, self._expected
        if pattern.constant is not None:
            expected.fill_(pattern.constant)
        else:
            torch.add(self._index, first + 1, out=expected)
            expected.mul_(_SPREAD)
        return expected.bitwise_not_() if pattern.flipped else expected

    def difference(self, block: Any, expected: Any) -> Any:
        """Return the bits in which a block differs from the expected ones."""
        return self._device.torch.bitwise_xor(block, expected, out=self._difference)


def _price(device: Device, blocks: _Blocks, until: float) -> float:
    """Return the seconds per byte of all patterns, including the time to allocate new pages on a host.

    Raises:
        SkipError: there is no time for this measurement.
    """
    price, left = 0.0, until - time.perf_counter()
    if left <= 0:
        raise SkipError(checked_device.NO_TIME)
    # One block shows whether there is time for several; only several give the true cost.
    for size in (blocks.bytes, blocks.bytes, _TRIAL_BYTES):
        if price * size > left / 4:
            break
        price = device.timed(partial(_trial, device, blocks, size)) / size * _CAUTION
    return price


def _trial(device: Device, blocks: _Blocks, size: int) -> None:
    chunks, errors = list(_allocate(device, size)), _Errors()
    for pattern in PATTERNS:
        _is_written(blocks, pattern, chunks, math.inf)
        _is_checked(blocks, pattern, chunks, errors, math.inf)


def _allocate(device: Device, size: int) -> Iterator[Any]:
    """Yield memory of this size, a chunk at a time; stop early where the allocator fails."""
    chunk = _CARD_CHUNK if device.is_card else _HOST_CHUNK
    while size > 0:
        try:
            yield device.torch.empty(min(size, chunk) // _WORD, device=device.name, dtype=device.torch.int64)
        except (RuntimeError, MemoryError):  # torch.OutOfMemoryError is the former
            return
        size -= chunk


def _blocks_of(blocks: _Blocks, chunks: Sequence[Any], first: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield (the number of its first word, the block) for all blocks; `first` is the number of the first word."""
    for chunk in chunks:
        for block in chunk.split(blocks.words):
            yield first, block
            first += blocks.words


def _is_written(blocks: _Blocks, pattern: Pattern, chunks: Sequence[Any], until: float, begin: int = 0) -> bool:
    """Write a pattern to all chunks; return whether there was time for it."""
    for first, block in _blocks_of(blocks, chunks, begin):
        if time.perf_counter() > until:
            return False
        block.copy_(blocks.expected(pattern, first))
    return True


def _is_checked(blocks: _Blocks, pattern: Pattern, chunks: Sequence[Any], errors: _Errors, until: float) -> bool:
    """Compare all chunks with a pattern and record differences; return whether there was time for it."""
    for first, block in _blocks_of(blocks, chunks):
        if time.perf_counter() > until:
            return False
        difference = blocks.difference(block, blocks.expected(pattern, first))
        if bool(difference.any()):
            # Use the values just read: a second read might be right.
            wrong = difference.nonzero().flatten()
            if not errors.words:
                place = int(wrong[0])
                errors.first = ((first + place) * _WORD, int(difference[place]) & ((1 << 64) - 1), pattern.name)
            errors.words += len(wrong)
    return True
