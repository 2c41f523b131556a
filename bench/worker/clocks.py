"""The clocks of a device: the host's, a queue's, and CUDA's events."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock(Protocol):
    """Times one loop: a whole, and the marks that the loop sets in between."""

    def start(self) -> None:
        """Synchronise and begin."""

    def mark(self) -> None:
        """A step has ended (or the first begins); costs microseconds and waits for nothing."""

    def stop(self) -> tuple[float, tuple[float, ...]]:
        """Synchronise and end: whole seconds, and the seconds between the marks."""


class HostClock:
    """For a device that works in step with the host: the CPU."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Take the clock; tests pass their own."""
        self._now = now
        self._began = 0.0
        self._marks: list[float] = []

    def start(self) -> None:
        """Begin."""
        self._marks = []
        self._began = self._now()

    def mark(self) -> None:
        """Note the time."""
        self._marks.append(self._now())

    def stop(self) -> tuple[float, tuple[float, ...]]:
        """End."""
        whole = self._now() - self._began
        return whole, tuple(b - a for a, b in zip(self._marks, self._marks[1:], strict=False))


class QueueClock:
    """For a device that takes work in a queue and tells no times of its own (MPS): the whole alone is known."""

    def __init__(self, wait: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> None:
        """Take what waits for the device."""
        self._wait = wait
        self._now = now
        self._began = 0.0

    def start(self) -> None:
        """Wait until the device is idle, then begin."""
        self._wait()
        self._began = self._now()

    def mark(self) -> None:
        """The host is ahead of the device: its time would mean nothing."""

    def stop(self) -> tuple[float, tuple[float, ...]]:
        """Wait until the device is done."""
        self._wait()
        return self._now() - self._began, ()


class CudaClock:
    """For a CUDA device: events are recorded on its stream and read after the loop has ended."""

    def __init__(self, torch: Any, device: str) -> None:
        """Take torch and the device."""
        self._torch = torch
        self._device = device
        self._began = 0.0
        self._events: list[Any] = []

    def start(self) -> None:
        """Wait until the device is idle, then begin."""
        self._events = []
        self._torch.cuda.synchronize(self._device)
        self._began = time.perf_counter()

    def mark(self) -> None:
        """Put an event on the stream."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._torch.cuda.current_stream(self._device))
        self._events.append(event)

    def stop(self) -> tuple[float, tuple[float, ...]]:
        """Wait until the device is done, then read the events (milliseconds)."""
        self._torch.cuda.synchronize(self._device)
        whole = time.perf_counter() - self._began
        pairs = zip(self._events, self._events[1:], strict=False)
        return whole, tuple(a.elapsed_time(b) / 1000.0 for a, b in pairs)


def clock_for(torch: Any, device: str) -> Clock:
    """The clock that fits a device."""
    if device == "mps":
        return QueueClock(lambda: synchronize(torch, device))
    return CudaClock(torch, device) if device.startswith("cuda") else HostClock()


def synchronize(torch: Any, device: str) -> None:
    """Wait until a device has done all that it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
