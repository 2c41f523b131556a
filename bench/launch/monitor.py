"""Looks at a worker from outside, twice a second: its memory over time, its card, and what the looking costs."""

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

_MOST_MOMENTS = 600
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass
class _Window:
    """What was seen while images were made, over all the stretches in which they were."""

    readings: list[NvmlSample] = field(default_factory=list)
    seconds: float = 0.0
    own_seconds: float = 0.0
    joules: float = 0.0
    counted: bool = True


class WorkerMonitor:
    """A worker's watch. `look` is called at every turn of the parent's waiting; it sleeps nowhere."""

    def __init__(self, pid: int, window: str = "samples", *, is_paired: bool = False) -> None:
        """Begin with a worker that was just started.

        Args:
            pid: its process.
            window: the phase in which its card is watched.
            is_paired: it is one of two on one card, whose energy is of both.
        """
        self._pid = pid
        self._wanted = window
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

    def found_card(self, uuid: str) -> None:
        """The worker has told which card it uses."""
        self._card = NvmlDevice(uuid)
        self._first = self._card.read()

    def enter(self, phase: str) -> None:
        """The worker goes on to another phase."""
        self.look()
        if phase == self._wanted and self._phase != self._wanted:
            self._last = (time.monotonic(), time.process_time(), self._card.read())
        self._phase = phase

    def look(self) -> None:
        """Read everything once."""
        reading = self._card.read()
        now, own = time.monotonic(), time.process_time()
        if reading is not None:
            self._note_memory(reading)
        self._note_moment(now, reading)
        if self._phase == self._wanted and self._last is not None:
            self._note_samples(now, own, reading)
        self._last = (now, own, reading)

    def close(self) -> None:
        """Let go of the card."""
        self._card.close()

    def add_to(self, result: Result) -> Result:
        """A result with what was seen."""
        window = self._window
        memory = replace(result.memory, device_used_bytes=self._most_used, device_process_bytes=self._most_own)
        host = result.host
        if host is not None:
            share = window.own_seconds / window.seconds if window.seconds else None
            host = replace(host, harness_share=share, gpu=self.gpu())
        return replace(result, memory=memory, host=host, timeline=tuple(self._moments))

    def gpu(self) -> GpuLoadStats | None:
        """What the card did meanwhile; None where it says nothing."""
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
        if len(self._moments) > _MOST_MOMENTS:  # a long run is kept with half as many
            self._moments = self._moments[::2]
            self._stride *= 2

    def _note_samples(self, now: float, own: float, reading: NvmlSample | None) -> None:
        assert self._last is not None  # noqa: S101 (the caller has looked)
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
        clocks = [each.clock_mhz for each in readings if each.clock_mhz is not None]
        heats = [each.temperature for each in readings if each.temperature is not None]
        powers = [each.power_watts for each in readings if each.power_watts is not None]
        energies = [each for each in readings if each.energy_joules is not None]
        knows_energy = bool(powers or energies) and not self._is_paired
        told = [each.reasons for each in readings if each.reasons is not None]
        return GpuLoadStats(
            clock_mhz_median=statistics.median(clocks) if clocks else None,
            clock_mhz_minimum=min(clocks, default=None),
            temperature_maximum=max(heats, default=None),
            power_watts_mean=statistics.fmean(powers) if powers else None,
            power_limit_watts=self._card.power_limit_watts,
            throttled={
                name: sum(name in each for each in told) / len(told) for name in sorted(frozenset().union(*told))
            },
            reasons_told=bool(told),
            others=self._others(),
            energy_joules=self._window.joules if knows_energy else None,
            energy_source=("counter" if self._window.counted else "power") if knows_energy else None,
        )

    def _others(self) -> int | None:
        """Processes on the card besides the worker, and the other one of its pair.

        In a container the driver tells other numbers than ours: there all that were on it before the worker are others,
        and of the rest one is the worker itself.
        """
        lists = [each.processes for each in self._window.readings if each.processes is not None]
        if not lists:
            return None
        before = set((self._first.processes or {}) if self._first is not None else ())
        most = 0
        for processes in lists:
            others = set(processes) - {self._pid}
            if self._pid not in processes:
                fresh = others - before
                others -= set(sorted(fresh)[:1])
            most = max(most, len(others) - self._is_paired)
        return most


def _rss_bytes(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None
