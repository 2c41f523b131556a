"""Clocks and memory readings around a sampling loop; the loop itself is never synchronised."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bench.result import Host, Memory

if TYPE_CHECKING:
    from collections.abc import Callable

_SELF = Path("/proc/self")
_STAT = Path("/proc/stat")


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


class CudaClock:
    """For a CUDA device: events are recorded on its stream and read after the loop has ended."""

    def __init__(self, torch: Any, device: str) -> None:  # noqa: ANN401 (the module itself: torch loads late)
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


def clock_for(torch: Any, device: str) -> Clock:  # noqa: ANN401
    """The clock that fits a device."""
    return CudaClock(torch, device) if device.startswith("cuda") else HostClock()


def reset_host_peak() -> bool:
    """Let the kernel forget the process's high-water mark. Returns whether it did (Linux 4.0 and later)."""
    with contextlib.suppress(OSError):
        (_SELF / "clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def host_peak_bytes() -> int | None:
    """The high-water mark of resident memory since it was last reset."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", (_SELF / "status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def reset_device_peak(torch: Any, device: str) -> None:  # noqa: ANN401
    """Begin a new phase for the device's allocator."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def memory(torch: Any, device: str, load_peak: int | None, *, phases: bool) -> Memory:  # noqa: ANN401
    """The peaks of the phase that is ending.

    Args:
        torch: the module.
        device: where the case ran.
        load_peak: what `host_peak_bytes` said when the load ended.
        phases: whether the host's mark could be reset; where not, a peak would not be of its phase.
    """
    cuda = device.startswith("cuda")
    return Memory(
        host_load_peak_bytes=load_peak if phases else None,
        host_run_peak_bytes=host_peak_bytes() if phases else None,
        device_peak_allocated_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
        device_peak_reserved_bytes=torch.cuda.max_memory_reserved(device) if cuda else None,
    )


class Neighbours:
    """What the rest of the machine does between two readings."""

    def __init__(self) -> None:
        """Read for the first time."""
        self._first = _cpu_ticks()

    def host(self, threads: int, cpu_seconds: float, wall_seconds: float) -> Host:
        """Read again and compare.

        Args:
            threads: how many the case computes with.
            cpu_seconds: what the process used while the samples were taken.
            wall_seconds: how long they took.
        """
        steal = None
        last = _cpu_ticks()
        if self._first and last and last[1] > self._first[1]:
            steal = (last[0] - self._first[0]) / (last[1] - self._first[1])
        try:
            load = float(Path("/proc/loadavg").read_text(encoding="ascii").split()[0])
        except (OSError, ValueError):
            load = None
        share = cpu_seconds / wall_seconds / threads if wall_seconds > 0 else None
        return Host(threads=threads, cpu_share=share, steal_share=steal, load_average=load)


def _cpu_ticks() -> tuple[int, int] | None:
    """(stolen, all) ticks since boot, from /proc/stat: user nice system idle iowait irq softirq steal."""
    try:
        words = _STAT.read_text(encoding="ascii").splitlines()[0].split()[1:9]
    except (OSError, IndexError):
        return None
    ticks = [int(word) for word in words]
    return (ticks[7], sum(ticks)) if len(ticks) == 8 else None
