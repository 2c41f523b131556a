"""Monitors a worker from its parent process twice a second: memory, GPU, and the CPU time of the parent itself."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.core.result import Moment, Result
from bench.core.validation_records import GpuLoadStats
from bench.gpu.nvml import NvmlDevice

if TYPE_CHECKING:
    from bench.gpu.nvml import NvmlSample

_MAX_MOMENTS = 600
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass
class _Window:
    """Hold the measurements within one phase of the worker, which it may enter several times.

    `readings`: the state of the GPU at each poll. `seconds`: the time in the phase. `own_seconds`: the CPU seconds of
    the parent in it. `joules`: the energy of the GPU in it. `counted`: all of `joules` comes from the GPU's energy
    counter; otherwise some of it is power times time.
    """

    readings: list[NvmlSample] = field(default_factory=list)
    seconds: float = 0.0
    own_seconds: float = 0.0
    joules: float = 0.0
    counted: bool = True


class WorkerMonitor:
    """Measure the memory and the GPU of one worker, and the CPU time of the parent.

    It has no thread of its own: the parent calls `poll` about twice a second.
    """

    def __init__(self, pid: int, window: str = "samples", *, is_paired: bool = False) -> None:
        """Start to monitor a worker that was just started.

        Args:
            pid: the worker's process id.
            window: the phase in which the GPU is monitored.
            is_paired: a second worker takes turns with this one on the same GPU. The GPU's energy is then not reported.
        """
        self._pid = pid
        self._window_phase = window
        self._is_paired = is_paired
        self._began = time.monotonic()
        self._phase = "start"
        self._card = NvmlDevice(None)
        self._moments: list[Moment] = []
        self._stride, self._turn = 1, 0
        self._window = _Window()
        self._last: tuple[float, float, NvmlSample | None] | None = None
        self._most_used: int | None = None
        self._most_own: int | None = None
        self._first: NvmlSample | None = None

    def open_card(self, uuid: str) -> None:
        """Open the GPU with this UUID, which the worker has named as its own."""
        self._card = NvmlDevice(uuid)
        self._first = self._card.read()

    def enter(self, phase: str) -> None:
        """Record that the worker has begun this phase."""
        self.poll()
        if phase == self._window_phase and self._phase != self._window_phase:
            self._last = (time.monotonic(), time.process_time(), self._card.read())
        self._phase = phase

    def poll(self) -> None:
        """Measure the worker and its GPU once."""
        reading = self._card.read()
        now, own = time.monotonic(), time.process_time()
        if reading is not None:
            self._note_memory(reading)
        self._note_moment(now, reading)
        if self._phase == self._window_phase and self._last is not None:
            self._note_samples(now, own, reading)
        self._last = (now, own, reading)

    def close(self) -> None:
        """Close the connection to NVML."""
        self._card.close()

    def add_to(self, result: Result) -> Result:
        """Return the result with what the monitor has measured.

        These are the memory and GPU of the worker, the parent's share of a core, and the memory over time.
        """
        window = self._window
        memory = replace(result.memory, device_used_bytes=self._most_used, device_process_bytes=self._most_own)
        host = result.host
        if host is not None:
            share = window.own_seconds / window.seconds if window.seconds else None
            host = replace(host, harness_share=share, gpu=self.gpu())
        return replace(result, memory=memory, host=host, timeline=tuple(self._moments))

    def gpu(self) -> GpuLoadStats | None:
        """Return the GPU's clocks, power and throttling within the monitored phase.

        None if the GPU could not be read.
        """
        return self._gpu() if self._window.readings else None

    def _note_memory(self, reading: NvmlSample) -> None:
        if reading.used_bytes is not None:
            self._most_used = max(self._most_used or 0, reading.used_bytes)
        own = (reading.processes or {}).get(self._pid)
        if own is not None:
            self._most_own = max(self._most_own or 0, own)

    def _note_moment(self, now: float, reading: NvmlSample | None) -> None:
        self._turn += 1
        if self._turn % self._stride:
            return
        device = reading.used_bytes if reading is not None else None
        self._moments.append(Moment(round(now - self._began, 3), self._phase, _rss_bytes(self._pid), device))
        if len(self._moments) > _MAX_MOMENTS:  # a long run has too many, so every second one is dropped
            self._moments = self._moments[::2]
            self._stride *= 2

    def _note_samples(self, now: float, own: float, reading: NvmlSample | None) -> None:
        assert self._last is not None  # noqa: S101 (the caller has checked)
        before, own_before, last = self._last
        window = self._window
        window.seconds += now - before
        window.own_seconds += own - own_before
        if reading is None:
            return
        window.readings.append(reading)
        if last is not None and last.energy_joules is not None and reading.energy_joules is not None:
            window.joules += reading.energy_joules - last.energy_joules
        elif reading.power_watts is not None:
            window.counted = False
            window.joules += reading.power_watts * (now - before)

    def _gpu(self) -> GpuLoadStats:
        readings = self._window.readings
        clocks = [reading.clock_mhz for reading in readings if reading.clock_mhz is not None]
        temperatures = [reading.temperature for reading in readings if reading.temperature is not None]
        powers = [reading.power_watts for reading in readings if reading.power_watts is not None]
        energies = [reading for reading in readings if reading.energy_joules is not None]
        knows_energy = bool(powers or energies) and not self._is_paired
        reasons = [reading.reasons for reading in readings if reading.reasons is not None]
        return GpuLoadStats(
            clock_mhz_median=statistics.median(clocks) if clocks else None,
            clock_mhz_minimum=min(clocks, default=None),
            temperature_maximum=max(temperatures, default=None),
            power_watts_mean=statistics.fmean(powers) if powers else None,
            power_limit_watts=self._card.power_limit_watts,
            throttled={
                name: sum(name in active for active in reasons) / len(reasons)
                for name in sorted(frozenset().union(*reasons))
            },
            reasons_told=bool(reasons),
            others=self._others(),
            energy_joules=self._window.joules if knows_energy else None,
            energy_source=("counter" if self._window.counted else "power") if knows_energy else None,
        )

    def _others(self) -> int | None:
        """Return the largest number of processes on the GPU besides the worker and the other worker of its pair.

        None if NVML lists no processes. In a container NVML reports process ids of the host, so the worker's own id is
        not in its list. Then each process that was on the GPU before the worker counts as another one, and one of the
        new processes is taken for the worker.
        """
        lists = [reading.processes for reading in self._window.readings if reading.processes is not None]
        if not lists:
            return None
        before = set((self._first.processes or {}) if self._first is not None else ())
        largest = 0
        for processes in lists:
            others = set(processes) - {self._pid}
            if self._pid not in processes:
                fresh = others - before
                others -= set(sorted(fresh)[:1])
            largest = max(largest, len(others) - self._is_paired)
        return largest


def _rss_bytes(pid: int) -> int | None:
    """Return the resident memory of a process in bytes; None if /proc does not have the process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None
