"""Clocks and memory readings around a sampling loop; the loop itself is never synchronised."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bench.result import Host, Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

_SELF = Path("/proc/self")
_STAT = Path("/proc/stat")
_PRESSURE = Path("/proc/pressure/cpu")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_V1_INACTIVE = "total_inactive_file"
_NO_LIMIT = 1 << 60  # version 1 writes the largest multiple of a page where version 2 writes "max"
_USS_SECONDS = 0.05


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


def reset_host_peak() -> bool:
    """Let the kernel forget the process's high-water mark. Returns whether it did (Linux 4.0 and later)."""
    with contextlib.suppress(OSError):
        (_SELF / "clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def host_peak_bytes() -> int | None:
    """The high-water mark of resident memory since it was last reset."""
    return _status_bytes("VmHWM")


def rss_bytes() -> int | None:
    """Resident memory now."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", (_SELF / "status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def free_bytes() -> int | None:
    """Return the bytes that the kernel would still give: of the machine, or of a control group that has fewer left."""
    left = [_number(_MEMINFO, r"^MemAvailable:\s+(\d+) kB", 1024), *(_left_of(*group) for group in _control_groups())]
    return min((each for each in left if each is not None), default=None)


def _control_groups() -> list[tuple[Path, str, str, str]]:
    """Return (folder, limit's file, usage's file, reclaimable row of memory.stat) of every group of this process.

    A container sees its own group at the top; elsewhere /proc/self/cgroup names it, and its parents' limits hold too.
    Source: the kernel's cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        rows = (_SELF / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        rows = []
    named = {kinds: place for _, kinds, place in (row.split(":", 2) for row in rows if row.count(":") >= 2)}
    found = []
    for top, place, limit, usage, reclaimable in (
        (_CGROUP, named.get("", "/"), "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", named.get("memory", "/"), "memory.limit_in_bytes", "memory.usage_in_bytes", _V1_INACTIVE),
    ):
        own = top / place.lstrip("/")
        groups = [own, *(folder for folder in own.parents if folder.is_relative_to(top))]
        found += [(folder, limit, usage, reclaimable) for folder in groups]
    return found


def _left_of(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Return the bytes that a control group may still take; the kernel reclaims inactive page cache first."""
    most, used = _number(folder / limit, r"^(\d+)"), _number(folder / usage, r"^(\d+)")
    if most is None or used is None or most >= _NO_LIMIT:
        return None
    return max(0, most - used + (_number(folder / "memory.stat", rf"^{reclaimable} (\d+)") or 0))


def _number(path: Path, pattern: str, unit: int = 1) -> int | None:
    try:
        found = re.search(pattern, path.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * unit if found else None


class Peaks:
    """The peaks of one phase, without what is done in its pauses (a probe between two images)."""

    def __init__(self, torch: Any, device: str) -> None:
        """Begin the phase."""
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # what the allocator holds of a probe is no part of it
        self._torch = torch
        self._device = device
        self._host: int | None = None
        self._allocated: int | None = None
        self._reserved: int | None = None
        self._is_phase = True
        self.resume()

    def pause(self) -> None:
        """Take the peaks until now."""
        if self._is_phase:
            self._host = _larger(self._host, host_peak_bytes())
        if self._device.startswith("cuda"):
            self._allocated = _larger(self._allocated, self._torch.cuda.max_memory_allocated(self._device))
            if self._reserved is None:  # later ones hold what the allocator kept of a probe
                self._reserved = int(self._torch.cuda.max_memory_reserved(self._device))

    def resume(self) -> None:
        """Count from here."""
        self._is_phase = reset_host_peak()
        if self._device.startswith("cuda"):
            self._torch.cuda.reset_peak_memory_stats(self._device)

    def memory(self) -> Memory:
        """The peaks of the phase that `pause` has ended; of the host none where its mark could not be reset."""
        return Memory(
            host_run_peak_bytes=self._host,
            device_peak_allocated_bytes=self._allocated,
            device_peak_reserved_bytes=self._reserved,
        )


def _larger(known: int | None, found: int | None) -> int | None:
    return max((each for each in (known, found) if each is not None), default=None)


def uss_bytes() -> int | None:
    """The memory of this process that no other one shares."""
    try:
        text = (_SELF / "smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return None
    return sum(int(number) * 1024 for number in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE))


class UssPeak:
    """Reads `uss_bytes` in a thread of its own while it is entered. It takes a core's time: not where time is taken."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self.bytes: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = _larger(self.bytes, uss_bytes())
            if self._ended.wait(_USS_SECONDS):
                return


class Neighbours:
    """What the rest of the machine does while images are made: enter it for each, so that nothing else counts."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._stolen = self._ticks = 0
        self._pressed: float | None = 0.0
        self._waited: float | None = 0.0
        self._passed = 0.0

    def __enter__(self) -> Self:
        self._first = (_cpu_ticks(), _pressure_seconds(), _waited_seconds(), time.monotonic())
        return self

    def __exit__(self, *_: object) -> None:
        ticks, pressed, waited, began = self._first
        self._passed += time.monotonic() - began
        last = _cpu_ticks()
        if ticks and last:
            self._stolen += last[0] - ticks[0]
            self._ticks += last[1] - ticks[1]
        self._pressed = _sum(self._pressed, _since(pressed, _pressure_seconds()))
        self._waited = _sum(self._waited, _since(waited, _waited_seconds()))

    def host(self, threads: int, cpu_seconds: float, wall_seconds: float) -> Host:
        """What was seen.

        Args:
            threads: how many the case computes with.
            cpu_seconds: what the process used while the samples were taken.
            wall_seconds: how long they took.
        """
        try:
            load = float(Path("/proc/loadavg").read_text(encoding="ascii").split()[0])
        except (OSError, ValueError):
            load = None
        share = cpu_seconds / wall_seconds / threads if wall_seconds > 0 else None
        passed = self._passed
        return Host(
            threads=threads,
            cpu_share=share,
            steal_share=self._stolen / self._ticks if self._ticks else None,
            load_average=load,
            pressure_share=self._pressed / passed if self._pressed is not None and passed else None,
            wait_share=self._waited / passed / threads if self._waited is not None and passed else None,
        )


def _sum(known: float | None, more: float | None) -> float | None:
    return None if known is None or more is None else known + more


def _since(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else max(0.0, last - first)


def _cpu_ticks() -> tuple[int, int] | None:
    """(stolen, all) ticks since boot, from /proc/stat: user nice system idle iowait irq softirq steal."""
    try:
        words = _STAT.read_text(encoding="ascii").splitlines()[0].split()[1:9]
    except (OSError, IndexError):
        return None
    ticks = [int(word) for word in words]
    return (ticks[7], sum(ticks)) if len(ticks) == 8 else None


def _pressure_seconds() -> float | None:
    """Seconds since boot in which some task waited for a core (source: the kernel's accounting/psi.rst)."""
    try:
        found = re.search(r"^some .*total=(\d+)", _PRESSURE.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) / 1e6 if found else None


def _waited_seconds() -> float | None:
    """Seconds in which this process's threads were ready and had no core (source: the kernel's sched-stats.rst)."""
    waited = 0
    try:
        for thread in (_SELF / "task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                waited += int((thread / "schedstat").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return waited / 1e9
