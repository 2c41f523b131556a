"""Test most of a device's free memory: write patterns to it, read them back, and compare every byte."""

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
    # Called with the pattern's name and the memory between writing and reading back, so that tests can change a byte.
    Between = Callable[[str, Sequence[Any]], None]

_WORD = 8  # bytes of a word, the unit that is written and compared
# The shares of the free memory that are tested. On a card about a tenth is left to other processes. On a host at most
# half is used: a card rejects an allocation that is too large, but the kernel of a host kills some process.
_CARD_SHARE, _HOST_SHARE = 0.87, 0.5
_CARD_CHUNK, _HOST_CHUNK = 512 << 20, 64 << 20  # bytes
_TRIAL_BYTES = 64 << 20  # more than an allocator caches, and more than most caches of a CPU hold
_CAUTION = 1.1
# The block that is written at once; it and its few copies fit in a cache.
_CARD_BLOCK, _HOST_BLOCK = 4 << 20, 1 << 20  # words
# The product with this odd number differs for all addresses, since it has an inverse modulo 2**64; and the products of
# neighbouring addresses differ in bits of all 64 places. It is 2**64 over the golden ratio (Knuth, The Art of Computer
# Programming, 6.4).
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)
_ALTERNATING = 0x5555555555555555


@dataclass(frozen=True)
class Pattern:
    """Describe what is written to each word of the memory.

    `constant`: the content of every word; None: each word gets its own address, times _SPREAD. `flipped`: all bits are
    inverted.
    """

    name: str
    constant: int | None
    flipped: bool = False


# With these patterns each bit of each word is a one once and a zero once, and neighbouring bits are equal once and
# different once. A stuck address line is found, since the whole memory is written before its first word is read back.
PATTERNS = (
    Pattern("own address", None),
    Pattern("own address inverted", None, flipped=True),
    Pattern("0x55", _ALTERNATING),
    Pattern("0xAA", _ALTERNATING, flipped=True),
)


def memory(device: Device, until: float, between: Between | None = None) -> Iterator[Reading]:
    """Yield one reading: the tested share of the free memory; words that were read back wrong are its fault.

    Args:
        device: the device.
        until: the time (time.perf_counter) by which the test has to end; it limits how much memory is tested.
        between: called after each pattern was written and before it is read back.
    """
    blank = Reading("memory", "memory", device.name, "", None)
    device.empty_cache()
    yield checked_device.reading_or_error(
        blank, partial(_test_patterns, device, until, between or (lambda *_: None), blank)
    )
    device.empty_cache()


def _test_patterns(device: Device, until: float, between: Between, blank: Reading) -> Reading:
    free = device.free_bytes()
    if free is None:
        raise SkipError("the amount of free memory is unknown")
    share = _CARD_SHARE if device.is_card else _HOST_SHARE
    blocks = _Blocks(device)
    if free * share < blocks.bytes:
        raise SkipError(f"only {free} bytes are free")
    seconds_per_byte = _seconds_per_byte(device, blocks, until)
    device.empty_cache()
    # The first pattern is written while memory is allocated: new pages of a host may take longer than all the rest.
    chunks: list[Any] = []
    tested, reason = 0, "the allocator returned no memory"
    for chunk in _allocate(device, int(free * share) // blocks.bytes * blocks.bytes):
        more = len(chunk) * _WORD
        is_time = (tested + more) * seconds_per_byte < until - time.perf_counter()
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
    """Count the words that were read back wrong, and describe the first of them."""

    words: int = 0
    first: tuple[int, int, str] = field(default=(0, 0, ""))  # offset in bytes, the differing bits, the pattern

    def fault(self) -> str | None:
        """Return the text of the fault; None if no word was wrong."""
        if not self.words:
            return None
        offset, bits, pattern = self.first
        named = ", ".join(str(bit) for bit in range(64) if bits >> bit & 1)
        return (
            f"wrong words of 8 bytes: {self.words}; the first is at byte {offset} of the tested memory, bits {named} "
            f"flipped, pattern: {pattern}"
        )


class _Blocks:
    """Compute the expected content of each block of words, in buffers that are allocated once."""

    def __init__(self, device: Device) -> None:
        """Allocate the buffers."""
        self.words = _CARD_BLOCK if device.is_card else _HOST_BLOCK
        self.bytes = self.words * _WORD
        self._device = device
        torch = device.torch
        self._index = torch.arange(self.words, device=device.name, dtype=torch.int64)
        self._expected = torch.empty_like(self._index)
        self._difference = torch.empty_like(self._index)

    def expected(self, pattern: Pattern, first: int) -> Any:
        """Return the expected content of the block that begins at word number `first` of the tested memory."""
        torch, expected = self._device.torch, self._expected
        if pattern.constant is not None:
            expected.fill_(pattern.constant)
        else:
            torch.add(self._index, first + 1, out=expected)
            expected.mul_(_SPREAD)
        return expected.bitwise_not_() if pattern.flipped else expected

    def difference(self, block: Any, expected: Any) -> Any:
        """Return the exclusive or of the words of a block and the expected ones: the bits that differ."""
        return self._device.torch.bitwise_xor(block, expected, out=self._difference)


def _seconds_per_byte(device: Device, blocks: _Blocks, until: float) -> float:
    """Return the seconds that all patterns take per byte, including the time in which a host allocates new pages.

    Raises:
        SkipError: there is no time for this measurement.
    """
    seconds_per_byte, left = 0.0, until - time.perf_counter()
    if left <= 0:
        raise SkipError(checked_device.NO_TIME)
    # The time of one block shows whether there is time for several blocks, which are needed for the true value.
    for size in (blocks.bytes, blocks.bytes, _TRIAL_BYTES):
        if seconds_per_byte * size > left / 4:
            break
        seconds_per_byte = device.timed(partial(_trial, device, blocks, size)) / size * _CAUTION
    return seconds_per_byte


def _trial(device: Device, blocks: _Blocks, size: int) -> None:
    chunks, errors = list(_allocate(device, size)), _Errors()
    for pattern in PATTERNS:
        _is_written(blocks, pattern, chunks, math.inf)
        _is_checked(blocks, pattern, chunks, errors, math.inf)


def _allocate(device: Device, size: int) -> Iterator[Any]:
    """Yield memory of this size in bytes, one chunk at a time; stop early if an allocation fails."""
    chunk = _CARD_CHUNK if device.is_card else _HOST_CHUNK
    while size > 0:
        try:
            yield device.torch.empty(min(size, chunk) // _WORD, device=device.name, dtype=device.torch.int64)
        except (RuntimeError, MemoryError):  # torch.OutOfMemoryError is a RuntimeError
            return
        size -= chunk


def _blocks_of(blocks: _Blocks, chunks: Sequence[Any], first: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield (number of its first word, block) for each block of the chunks.

    `first` is the number of the first word of all.
    """
    for chunk in chunks:
        for block in chunk.split(blocks.words):
            yield first, block
            first += blocks.words


def _is_written(blocks: _Blocks, pattern: Pattern, chunks: Sequence[Any], until: float, begin: int = 0) -> bool:
    """Write a pattern to all chunks; return whether there was time for all of it."""
    for first, block in _blocks_of(blocks, chunks, begin):
        if time.perf_counter() > until:
            return False
        block.copy_(blocks.expected(pattern, first))
    return True


def _is_checked(blocks: _Blocks, pattern: Pattern, chunks: Sequence[Any], errors: _Errors, until: float) -> bool:
    """Compare all chunks with a pattern and record the differences; return whether there was time for all of it."""
    for first, block in _blocks_of(blocks, chunks):
        if time.perf_counter() > until:
            return False
        difference = blocks.difference(block, blocks.expected(pattern, first))
        if bool(difference.any()):
            # The words are not read a second time, for they might then be right.
            wrong = difference.nonzero().flatten()
            if not errors.words:
                place = int(wrong[0])
                errors.first = ((first + place) * _WORD, int(difference[place]) & ((1 << 64) - 1), pattern.name)
            errors.words += len(wrong)
    return True
