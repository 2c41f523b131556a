"""Measure the host load while images are made: stolen CPU time, pressure, and the time of waiting for a core."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.core.result import Host

if TYPE_CHECKING:
    from collections.abc import Iterator

_SELF = Path("/proc/self")
_STAT = Path("/proc/stat")
_PRESSURE = Path("/proc/pressure/cpu")


class HostLoad:
    """Measure the host load, only within the contexts of `watched`."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self._stolen = self._ticks = 0
        self._pressed: float | None = 0.0
        self._waited: float | None = 0.0
        self._passed = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Add the load during this context to the load that was measured before; one context is used per image."""
        ticks, pressed, waited, began = _cpu_ticks(), _pressure_seconds(), _waited_seconds(), time.monotonic()
        try:
            yield
        finally:
            self._passed += time.monotonic() - began
            last = _cpu_ticks()
            if ticks and last:
                self._stolen += last[0] - ticks[0]
                self._ticks += last[1] - ticks[1]
            self._pressed = _sum(self._pressed, _since(pressed, _pressure_seconds()))
            self._waited = _sum(self._waited, _since(waited, _waited_seconds()))

    def host(self, threads: int, cpu_seconds: float, wall_seconds: float) -> Host:
        """Return the load of all contexts so far.

        Args:
            threads: the number of torch's threads.
            cpu_seconds: the CPU time of the process during the samples.
            wall_seconds: the duration of the samples.
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
            wait_share=_share_of_wait(self._waited, cpu_seconds),
        )


def _share_of_wait(waited: float | None, worked: float) -> float | None:
    """Return the time that a process waited for a core over the time in which it waited or ran; None if it is unknown.

    Both are seconds, summed over its threads. The number of torch's threads does not enter, since a loop on a GPU uses
    one of them.
    """
    if waited is None or waited + worked <= 0:
        return None
    return waited / (waited + worked)


def _sum(total: float | None, more: float | None) -> float | None:
    return None if total is None or more is None else total + more


def _since(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else max(0.0, last - first)


def _cpu_ticks() -> tuple[int, int] | None:
    """Return (stolen, wanted) CPU ticks of the machine since boot; None if /proc/stat does not have them.

    Stolen ticks are those that the hypervisor took away. Wanted ticks are those for which there was work, stolen ones
    included. Idle ticks do not count, so that on a host with many cores the share of a few busy ones is not diluted.
    Source of the columns (user nice system idle iowait irq softirq steal): the kernel's filesystems/proc.rst.
    """
    try:
        words = _STAT.read_text(encoding="ascii").splitlines()[0].split()[1:9]
    except (OSError, IndexError):
        return None
    ticks = [int(word) for word in words]
    return (ticks[7], sum(ticks) - ticks[3] - ticks[4]) if len(ticks) == 8 else None


def _pressure_seconds() -> float | None:
    """Return the seconds since boot in which some task of the machine waited for a core; None if the kernel has no PSI.

    Source: the kernel's accounting/psi.rst.
    """
    try:
        match = re.search(r"^some .*total=(\d+)", _PRESSURE.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) / 1e6 if match else None


def _waited_seconds() -> float | None:
    """Return the seconds in which this process's threads have waited for a core.

    None if the kernel does not count them.

    Source: the kernel's sched-stats.rst.
    """
    waited = 0
    try:
        for thread in (_SELF / "task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
                waited += int((thread / "schedstat").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return waited / 1e9
