"""Time a sampling loop on a device: by the host's clock (CPU), around a queue of work (MPS), or with CUDA events."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock(Protocol):
    """Time one sampling loop: its whole duration, and the durations between the marks that the loop sets."""

    def start(self) -> None:
        """Wait until the device is idle, then begin."""

    def mark(self) -> None:
        """Mark the begin of the first step or the end of a step.

        This takes microseconds and does not wait for the device.
        """

    def stop(self) -> tuple[float, tuple[float, ...]]:
        """Wait until the device is idle; return the seconds since `start`, and the seconds between the marks."""


class HostClock:
    """Time a device that computes synchronously with the host: the CPU."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Store a function that returns the time in seconds; tests pass their own."""
        self._now = now
        self._began = 0.0
        self._marks: list[float] = []

    def start(self) -> None:
        """Store the time of the begin."""
        self._marks = []
        self._began = self._now()

    def mark(self) -> None:
        """Store the present time as a mark."""
        self._marks.append(self._now())

    def stop(self) -> tuple[float, tuple[float, ...]]:
        """Return the seconds since `start`, and the seconds between the marks."""
        whole = self._now() - self._began
        return whole, tuple(b - a for a, b in zip(self._marks, self._marks[1:], strict=False))


class QueueClock:
    """Time a device that queues its work and has no timestamps (MPS): only the whole duration is measured."""

    def __init__(self, wait: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> None:
        """Store the function that waits until the device is idle, and the one that returns the time in seconds."""
        self._wait = wait
        self._now = now
        self._began = 0.0

    def start(self) -> None:
        """Wait until the device is idle, then store the time."""
        self._wait()
        self._began = self._now()

    def mark(self) -> None:
        """Do nothing: the device has not yet computed the step when the host calls this, so the time would be wrong."""

    def stop(self) -> tuple[float, tuple[float, ...]]:
        """Wait until the device is idle; return the seconds since `start`, and no seconds of steps."""
        self._wait()
        return self._now() - self._began, ()


class CudaClock:
    """Time a CUDA device: each mark is an event on its stream, and the events are read after the loop."""

    def __init__(self, torch: Any, device: str) -> None:
        """Store torch and the name of the device, such as "cuda:0"."""
        self._torch = torch
        self._device = device
        self._began = 0.0
        self._events: list[Any] = []

    def start(self) -> None:
        """Wait until the device is idle, then store the time."""
        self._events = []
        self._torch.cuda.synchronize(self._device)
        self._began = time.perf_counter()

    def mark(self) -> None:
        """Record an event on the device's stream."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._torch.cuda.current_stream(self._device))
        self._events.append(event)

    def stop(self) -> tuple[float, tuple[float, ...]]:
        """Wait until the device is idle; return the seconds since `start`, and the seconds between the events."""
        self._torch.cuda.synchronize(self._device)
        whole = time.perf_counter() - self._began
        pairs = zip(self._events, self._events[1:], strict=False)
        return whole, tuple(a.elapsed_time(b) / 1000.0 for a, b in pairs)


def clock_for(torch: Any, device: str) -> Clock:
    """Return the clock for a device: "cpu", "cuda:N" or "mps"."""
    if device == "mps":
        return QueueClock(lambda: synchronize(torch, device))
    return CudaClock(torch, device) if device.startswith("cuda") else HostClock()


def synchronize(torch: Any, device: str) -> None:
    """Wait until a device has finished all queued work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
