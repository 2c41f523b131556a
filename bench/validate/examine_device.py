"""Runs the examination of one device from the parent process: its worker, its GPU's counters, and the readings."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.core.validation_records import PROCESS, DeviceFacts, Reading
from bench.core.worker_events import DeviceExamined
from bench.core.worker_requests import PHASES, WAITING, Examination
from bench.gpu import nvml
from bench.launch.worker_process import Worker
from bench.validate import judge, merge_readings
from bench.validate.expectations import Evidence
from bench.validate.reading_checks import ONCE, is_wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from bench.core.result import Host
    from bench.core.validation_records import GpuLoadStats
    from bench.core.worker_events import ExaminationReport
    from bench.run.request import BenchHost

GRACE_SECONDS = 30.0  # added to a worker's time limit, since the interpreter and its libraries may start slowly
# A GPU has worked just before these phases begin, so its PCIe link then runs at full speed.
_LOADED = frozenset({"memory", "sustained", "loop"})
AGAIN_SHARE = 0.25  # the time for repeated phases, as a share of the time for all phases
START_SECONDS = 10.0  # the time in which a worker starts: the import of torch, and the GPU's driver
_BEFORE = frozenset({"start", "imports"})  # in these phases the device is not used yet


class DeviceExamination:
    """Examine one device with a worker, as a context manager. Within the context phases can be repeated."""

    def __init__(self, bench: BenchHost, device: str, name: str, uuid: str | None) -> None:
        """Read the state of the device before the examination.

        Args:
            bench: the root and the interpreter.
            device: the name of the device in torch.
            name: the model of the GPU or CPU.
            uuid: the UUID of a GPU; None for a CPU.
        """
        self._bench = bench
        self.device = device
        self._card = nvml.NvmlDevice(uuid)
        self._card.watch()
        self._name = name
        self.before = self._card.describe(device, name)
        self._loaded: list[DeviceFacts] = []
        self.readings: list[Reading] = []
        self.seconds: dict[str, float] = {}
        self.software: dict[str, str] = {}
        self.host: Host | None = None
        self._has_hung = False
        self._stack = contextlib.ExitStack()
        self._worker: Worker | None = None
        self._watched: GpuLoadStats | None = None
        self._last: DeviceFacts | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        self._card.close()

    @property
    def is_alive(self) -> bool:
        """Return whether the worker is alive and waits for a control line."""
        return self._worker is not None and self._worker.received.phase == WAITING

    @property
    def watched(self) -> GpuLoadStats | None:
        """Return the GPU's clocks, power and throttling under sustained load.

        None for a CPU, or if they were not read.
        """
        current = self._worker.gpu() if self._worker is not None else None
        return current or self._watched

    def card(self) -> DeviceFacts:
        """Return the present facts of the device.

        Generation and width of the PCIe link are the largest ones under load.
        """
        if self._last is not None:
            return self._last
        current = self._card.describe(self.device, self._name, ours=int(self._worker is not None))
        return replace(
            current,
            pcie_generation=_most([facts.pcie_generation for facts in (*self._loaded, current)]),
            pcie_width=_most([facts.pcie_width for facts in (*self._loaded, current)]),
        )

    def examine(self, budget_seconds: float, evidence: Callable[[Evidence], Evidence]) -> None:
        """Run all phases, then repeat those whose readings violate a rule with `again`.

        If the worker dies, a new one runs all phases again. After a worker that hung there is no time for that.

        Args:
            budget_seconds: the time for all phases, with the start of the worker.
            evidence: returns the evidence on the device with the data of the host and of earlier runs added.
        """
        readings, end = self._run_new_worker(budget_seconds)
        if end is not None and not self._has_hung:  # after a worker that hung there is no time for another one
            first = end
            readings, end = self._run_new_worker(budget_seconds)
            readings.append(end or replace(first, fault=None, why_not=None, figures={ONCE: 1.0}))
        elif end is not None:
            readings.append(end)
        self.readings = readings
        if end is not None:
            return
        device_evidence = Evidence(
            (self.card(),),
            tuple(self.readings),
            before=(self.before,),
            watched={self.device: gpu} if (gpu := self.watched) is not None else {},
        )
        doubtful_phases = judge.phases_to_repeat(judge.judge(evidence(device_evidence)), self.readings)
        phases = [phase for phase in doubtful_phases if phase in PHASES]
        if phases:
            self.readings = list(
                merge_readings.merge(readings, self._repeat_after(readings, phases, budget_seconds * AGAIN_SHARE))
            )

    def repeat(self, phases: Sequence[str], seconds: float) -> list[Reading]:
        """Return the readings of repeated phases; a phase with a wrong reading runs once more.

        If the worker ends, the readings contain that too.

        Args:
            phases: the phases to repeat.
            seconds: their time limit.
        """
        readings = self._repeat_phases(phases, seconds)
        wrong = list(dict.fromkeys(reading.probe for reading in readings if is_wrong(reading)))
        if wrong and self.is_alive:
            readings = list(merge_readings.merge(readings, self._repeat_after(readings, wrong, seconds)))
        return readings

    def stop(self) -> None:
        """Kill the worker; another thread that listens to it then sees its end."""
        if self._worker is not None:
            self._worker.stop()

    def finish(self) -> None:
        """Make the worker end by itself, and keep its last report and the last facts of the device."""
        self._last = self.card()
        if self._worker is not None and self.is_alive:
            self._worker.close_stdin()
            self._worker.listen(time.monotonic() + GRACE_SECONDS)
        self._leave()

    def _keep(self, report: ExaminationReport) -> None:
        """Keep the last report of a worker; a worker that was killed has sent one before."""
        if report.host is None:
            return
        if self.host is None or report.host.cpu_share is not None:  # None if "sustained" was not among repeated phases
            self.host = report.host
        self.seconds |= report.seconds
        self.software = report.software or {}

    def _begin(self, budget_seconds: float, phases: Sequence[str]) -> Worker:
        self._leave()
        request = Examination(self.device, time.time(), budget_seconds, tuple(phases))
        worker = Worker(request, self._bench.python, self._bench.root.hub_in_use)
        self._worker = self._stack.enter_context(worker)
        return worker

    def _listen(self, worker: Worker, seconds: float) -> Reading | None:
        """Wait until the worker has run its phases; if it ends before, return the reading that records its end.

        The GPU's facts are read at the begin of each phase in _LOADED.
        """
        deadline = time.monotonic() + seconds + GRACE_SECONDS
        received, visited = worker.received, set[str]()
        while worker.listen(deadline, lambda: received.phase == WAITING or received.phase in _LOADED - visited):
            if received.phase == WAITING:
                return None
            visited.add(received.phase)
            self._loaded.append(self._card.describe(self.device, self._name, ours=1))
        return self._end_of(worker)

    def _run_new_worker(
        self, budget_seconds: float, phases: Sequence[str] = ()
    ) -> tuple[list[Reading], Reading | None]:
        """Run these phases (empty: all) in a new worker.

        Return its readings, and the reading of its early end or None.
        """
        worker = self._begin(budget_seconds, phases)
        end = self._listen(worker, budget_seconds)
        return list(worker.received.readings), end

    def _repeat_after(self, readings: Sequence[Reading], phases: Sequence[str], seconds: float) -> list[Reading]:
        """Repeat phases: in the same worker, or in a new one if a reading has a fault.

        A process whose GPU has failed cannot use the GPU any more.
        """
        if not any(reading.fault is not None for reading in readings):
            return self._repeat_phases(phases, seconds)
        again, end = self._run_new_worker(seconds + START_SECONDS, phases)
        return again if end is None else [*again, end]

    def _repeat_phases(self, phases: Sequence[str], seconds: float) -> list[Reading]:
        """Repeat phases in the same worker.

        Return the new readings, and the reading of the worker's early end if it ended.

        If there is no worker any more, there are no readings.
        """
        worker = self._worker
        if worker is None:
            return []
        count = len(worker.received.readings)
        worker.request_again(phases, seconds)
        end = self._listen(worker, seconds)
        readings = worker.received.readings[count:]
        return readings if end is None else [*readings, end]

    def _end_of(self, worker: Worker) -> Reading:
        """Return the early end of a worker as a reading.

        It is a fault of the device, since a healthy device survives all checks. But if the host's memory ran out, or
        the host is slow, it is the reason for missing values.
        """
        phase = worker.received.phase
        self._leave()
        self._has_hung = worker.code is None
        is_slow = self._has_hung and (self.device == "cpu" or phase in _BEFORE)
        end, reason = Reading(phase, PROCESS, self.device, "", None), worker.fault()
        is_host_fault = is_slow or worker.code == -signal.SIGKILL
        return replace(end, why_not=reason) if is_host_fault else replace(end, fault=reason)

    def _leave(self) -> None:
        if self._worker is not None:
            self._watched = self.watched
            answer = self._worker.received.answer
            if isinstance(answer, DeviceExamined):
                self._keep(answer.examined)
        self._worker = None
        self._stack.close()
        self._stack = contextlib.ExitStack()


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
