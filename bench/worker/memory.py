"""Clocks and memory readings around a sampling loop; the loop itself is never synchronised."""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.core.result import Memory

if TYPE_CHECKING:
    from typing_extensions import Self

_SELF = Path("/proc/self")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_V1_INACTIVE = "total_inactive_file"
_NO_LIMIT = 1 << 60  # version 1 writes the largest multiple of a page where version 2 writes "max"
_USS_SECONDS = 0.05


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
