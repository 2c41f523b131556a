"""Read the memory of this process, of the machine and of a device, and the peaks of memory over a time."""

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
_NO_LIMIT = 1 << 60  # a group without a limit has "max" in cgroup version 2, and a huge number in version 1
_USS_SECONDS = 0.05


def reset_host_peak() -> bool:
    """Reset the kernel's peak of this process's resident memory; return whether that worked (Linux 4.0 and later)."""
    with contextlib.suppress(OSError):
        (_SELF / "clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def host_peak_bytes() -> int | None:
    """Return the peak of this process's resident memory since the last reset; None if it cannot be read."""
    return _status_bytes("VmHWM")


def rss_bytes() -> int | None:
    """Return the present resident memory of this process; None if it cannot be read."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", (_SELF / "status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) * 1024 if match else None


def free_bytes() -> int | None:
    """Return the bytes that this process can still allocate; None if that is unknown.

    It is the available memory of the machine, or the memory left in its control group if that is less.
    """
    left = [
        _number(_MEMINFO, r"^MemAvailable:\s+(\d+) kB", 1024),
        *(_group_free_bytes(*group) for group in _control_groups()),
    ]
    return min((count for count in left if count is not None), default=None)


def _control_groups() -> list[tuple[Path, str, str, str]]:
    """Return (folder, limit file, usage file, reclaimable row of memory.stat) of every control group of this process.

    In a container, the group of the process is the top folder. Elsewhere /proc/self/cgroup has its path, and the limits
    of its parent groups apply too. Source: the kernel's cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        rows = (_SELF / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        rows = []
    paths = {kinds: path for _, kinds, path in (row.split(":", 2) for row in rows if row.count(":") >= 2)}
    control_groups = []
    for top, path, limit, usage, reclaimable in (
        (_CGROUP, paths.get("", "/"), "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", paths.get("memory", "/"), "memory.limit_in_bytes", "memory.usage_in_bytes", _V1_INACTIVE),
    ):
        own = top / path.lstrip("/")
        groups = [own, *(folder for folder in own.parents if folder.is_relative_to(top))]
        control_groups += [(folder, limit, usage, reclaimable) for folder in groups]
    return control_groups


def _group_free_bytes(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Return the bytes that a control group may still allocate; None without a limit.

    The inactive page cache counts as free, since the kernel reclaims it before the limit applies.
    """
    most, used = _number(folder / limit, r"^(\d+)"), _number(folder / usage, r"^(\d+)")
    if most is None or used is None or most >= _NO_LIMIT:
        return None
    return max(0, most - used + (_number(folder / "memory.stat", rf"^{reclaimable} (\d+)") or 0))


def _number(path: Path, pattern: str, unit: int = 1) -> int | None:
    try:
        match = re.search(pattern, path.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) * unit if match else None


class Peaks:
    """Collect the peaks of memory over a time, without what happens between `pause` and `resume` (a probe)."""

    def __init__(self, torch: Any, device: str) -> None:
        """Begin to collect."""
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # memory that a probe has left with the allocator does not count
        self._torch = torch
        self._device = device
        self._host: int | None = None
        self._allocated: int | None = None
        self._reserved: int | None = None
        self._is_phase = True
        self.resume()

    def pause(self) -> None:
        """Collect the peaks until now."""
        if self._is_phase:
            self._host = _larger(self._host, host_peak_bytes())
        if self._device.startswith("cuda"):
            self._allocated = _larger(self._allocated, self._torch.cuda.max_memory_allocated(self._device))
            if self._reserved is None:  # later values include memory that a probe has left with the allocator
                self._reserved = int(self._torch.cuda.max_memory_reserved(self._device))

    def resume(self) -> None:
        """Reset the counters of the kernel and of torch, so that they cover the time from now on."""
        self._is_phase = reset_host_peak()
        if self._device.startswith("cuda"):
            self._torch.cuda.reset_peak_memory_stats(self._device)

    def memory(self) -> Memory:
        """Return the collected peaks; call it after `pause`.

        The host's peak is None if the kernel's counter could not be reset.
        """
        return Memory(
            host_run_peak_bytes=self._host,
            device_peak_allocated_bytes=self._allocated,
            device_peak_reserved_bytes=self._reserved,
        )


def _larger(one: int | None, two: int | None) -> int | None:
    return max((value for value in (one, two) if value is not None), default=None)


def uss_bytes() -> int | None:
    """Return the bytes of this process that it shares with no other process (USS); None if they cannot be read."""
    try:
        text = (_SELF / "smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return None
    return sum(int(number) * 1024 for number in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE))


class UssPeak:
    """Collect the peak of `uss_bytes` (`bytes`) in a thread while the context is active.

    The thread takes CPU time, so no image is timed in this context.
    """

    def __init__(self) -> None:
        """Start with nothing read."""
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
