"""Questions about what a device moves: copies within its memory, and between it and the host."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from bench.core.validation_records import Reading
from bench.worker.checks import device as checked_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.worker.checks.device import Device

# From so many bytes on no cache holds both sides of a copy: of 64 MB a CPU's placements looked alike, and the largest
# cache of a card in the table is that of a B200, 126 MB.
_SIZES = (256 << 20, 1 << 30)


def copy(device: Device, until: float) -> Iterator[Reading]:
    """What a copy within the device's memory moves, as bytes read and written a second."""
    torch = device.torch

    def make(size: int) -> Callable[[], object]:
        source = torch.zeros(size, device=device.name, dtype=torch.uint8)
        return partial(torch.zeros_like(source).copy_, source)

    sizes = _SIZES if device.is_card else _SIZES[:1]
    ways = [checked_device.Variant(2.0 * size, {"bytes": float(size)}, 2 * size, partial(make, size)) for size in sizes]
    yield checked_device.timed_best(Reading("copy", "copy", device.name, "B/s", None), device, ways, until)


def pinned(device: Device, until: float) -> Iterator[Reading]:
    """What goes from the host's page-locked memory to a card a second, and what comes back."""
    torch, size = device.torch, _SIZES[0]

    def make(*, comes_back: bool) -> Callable[[], object]:
        here = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        there = torch.zeros(size, dtype=torch.uint8, device=device.name)
        return (
            partial(here.copy_, there, non_blocking=True)
            if comes_back
            else partial(there.copy_, here, non_blocking=True)
        )

    for left, name in ((2, "host to device"), (1, "device to host")):
        now = time.perf_counter()
        way = checked_device.Variant(float(size), {"bytes": float(size)}, size, partial(make, comes_back=left == 1))
        blank = Reading("pinned", name, device.name, "B/s", None)
        yield checked_device.timed_best(blank, device, [way], now + (until - now) / left)
