"""Measure copies: within the memory of a device, and between a device and the host."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from bench.core.validation_records import Reading
from bench.worker.checks import device as checked_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.worker.checks.device import Device

# No cache holds source and target of a copy of this size. With 64 MB, copies in and out of a CPU's cache had nearly the
# same rate; the largest cache of a card in specs.toml is that of a B200, 126 MB.
_SIZES = (256 << 20, 1 << 30)


def copy(device: Device, until: float) -> Iterator[Reading]:
    """Yield the rate of a copy within the device's memory: the bytes read plus the bytes written a second."""
    torch = device.torch

    def make(size: int) -> Callable[[], object]:
        source = torch.zeros(size, device=device.name, dtype=torch.uint8)
        return partial(torch.zeros_like(source).copy_, source)

    sizes = _SIZES if device.is_card else _SIZES[:1]
    variants = [
        checked_device.Variant(2.0 * size, {"bytes": float(size)}, 2 * size, partial(make, size)) for size in sizes
    ]
    yield checked_device.timed_best(Reading("copy", "copy", device.name, "B/s", None), device, variants, until)


def pinned(device: Device, until: float) -> Iterator[Reading]:
    """Yield the rates of copies from the host's page-locked memory to a card and back, in bytes a second."""
    torch, size = device.torch, _SIZES[0]

    def make(*, to_host: bool) -> Callable[[], object]:
        on_host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        on_device = torch.zeros(size, dtype=torch.uint8, device=device.name)
        return (
            partial(on_host.copy_, on_device, non_blocking=True)
            if to_host
            else partial(on_device.copy_, on_host, non_blocking=True)
        )

    for directions_left, name in ((2, "host to device"), (1, "device to host")):
        now = time.perf_counter()
        variant = checked_device.Variant(
            float(size), {"bytes": float(size)}, size, partial(make, to_host=directions_left == 1)
        )
        blank = Reading("pinned", name, device.name, "B/s", None)
        yield checked_device.timed_best(blank, device, [variant], now + (until - now) / directions_left)
