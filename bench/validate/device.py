"""One device's examination as the parent leads it: its worker, its card, and what both have told so far."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.core.protocol import PHASES, WAITING, Examination
from bench.core.validation_records import PROCESS, DeviceFacts, Reading
from bench.core.worker_events import DeviceExamined
from bench.gpu import nvml
from bench.launch.worker_process import Worker
from bench.validate import judge
from bench.validate.expectations import Evidence
from bench.validate.rule_checks import ONCE, is_wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from bench.core.result import Host
    from bench.core.validation_records import GpuLoadStats
    from bench.core.worker_events import ExaminationReport
    from bench.run.request import BenchHost

GRACE_SECONDS = 30.0  # beyond its budget: a cold start of the interpreter and its libraries
_LOADED = frozenset({"memory", "sustained", "loop"})  # as these begin, a card has just worked: so its link is awake
AGAIN_SHARE = 0.25  # of the budget, for what is asked once more
START_SECONDS = 10.0  # what a worker takes until it asks: torch, and the card's driver
_BEFORE = frozenset({"start", "imports"})  # the phases before the device is asked anything


class DeviceExamination:
    """A device and the worker that examines it: entered, examined, perhaps told to go on, left."""

    def __init__(self, bench: BenchHost, device: str, name: str, uuid: str | None) -> None:
        """Describe it as it is before anything was asked of it.

        Args:
            bench: where, and under which interpreter.
            device: as torch calls it.
            name: what it is.
            uuid: of a card; None of a CPU.
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
        """Whether its worker waits to be told more."""
        return self._worker is not None and self._worker.received.phase == WAITING

    @property
    def watched(self) -> GpuLoadStats | None:
        """What its card did under sustained load."""
        seen = self._worker.gpu() if self._worker is not None else None
        return seen or self._watched

    def card(self) -> DeviceFacts:
        """What it is now; its link as it was when it worked."""
        if self._last is not None:
            return self._last
        now = self._card.describe(self.device, self._name, ours=int(self._worker is not None))
        return replace(
            now,
            pcie_generation=_most([each.pcie_generation for each in (*self._loaded, now)]),
            pcie_width=_most([each.pcie_width for each in (*self._loaded, now)]),
        )

    def examine(self, budget_seconds: float, evidence: Callable[[Evidence], Evidence]) -> None:
        """Ask everything once, and again what the rules doubt. A worker that dies is started once more.

        Args:
            budget_seconds: for the whole plan, the start of its worker among it.
            evidence: adds what is known of the host and of earlier runs to what is known of the device.
        """
        found, end = self._whole(budget_seconds)
        if end is not None and not self._has_hung:  # what hangs has had its time
            first = end
            found, end = self._whole(budget_seconds)
            found.append(end or replace(first, fault=None, why_not=None, figures={ONCE: 1.0}))
        elif end is not None:
            found.append(end)
        self.readings = found
        if end is not None:
            return
        known = Evidence(
            (self.card(),),
            tuple(self.readings),
            before=(self.before,),
            watched={self.device: gpu} if (gpu := self.watched) is not None else {},
        )
        doubted = judge.doubtful(judge.judge(evidence(known)), self.readings)
        phases = [phase for phase in doubted if phase in PHASES]
        if phases:
            self.readings = list(judge.merged(found, self._anew(found, phases, budget_seconds * AGAIN_SHARE)))

    def go_on(self, phases: Sequence[str], seconds: float) -> list[Reading]:
        """Ask some phases anew. What is wrong is asked once more before it counts; an end of the worker is a reading.

        Args:
            phases: which.
            seconds: what they may take.
        """
        found = self._told(phases, seconds)
        wrong = list(dict.fromkeys(reading.probe for reading in found if is_wrong(reading)))
        if wrong and self.is_alive:
            found = list(judge.merged(found, self._anew(found, wrong, seconds)))
        return found

    def stop(self) -> None:
        """End its worker from another thread than the one that listens to it."""
        if self._worker is not None:
            self._worker.stop()

    def finish(self) -> None:
        """Let the worker end by itself, and keep what it and the card tell at last."""
        self._last = self.card()
        if self._worker is not None and self.is_alive:
            self._worker.let_go()
            self._worker.listen(time.monotonic() + GRACE_SECONDS)
        self._leave()

    def _keep(self, report: ExaminationReport) -> None:
        """Keep the last report of a worker; a worker that was killed has sent one whenever it waited."""
        if report.host is None:
            return
        if self.host is None or report.host.cpu_share is not None:  # one that was asked for a part saw no load
            self.host = report.host
        self.seconds |= report.seconds
        self.software = report.software or {}

    def _begin(self, budget_seconds: float, phases: Sequence[str]) -> Worker:
        self._leave()
        wanted = Examination(self.device, time.time(), budget_seconds, tuple(phases))
        worker = Worker(wanted, self._bench.python, self._bench.root.hub_in_use)
        self._worker = self._stack.enter_context(worker)
        return worker

    def _listen(self, worker: Worker, seconds: float) -> Reading | None:
        """Wait until it has asked all; its card is looked at where it has just worked. How it ended, where it did."""
        deadline = time.monotonic() + seconds + GRACE_SECONDS
        received, seen = worker.received, set[str]()
        while worker.listen(deadline, lambda: received.phase == WAITING or received.phase in _LOADED - seen):
            if received.phase == WAITING:
                return None
            seen.add(received.phase)
            self._loaded.append(self._card.describe(self.device, self._name, ours=1))
        return self._end_of(worker)

    def _whole(self, budget_seconds: float, phases: Sequence[str] = ()) -> tuple[list[Reading], Reading | None]:
        """What a new worker finds, by the whole plan or by some phases, and how it ended, where it did."""
        worker = self._begin(budget_seconds, phases)
        end = self._listen(worker, budget_seconds)
        return list(worker.received.readings), end

    def _anew(self, found: Sequence[Reading], phases: Sequence[str], seconds: float) -> list[Reading]:
        """Ask again; after a fault in a new worker: one whose card has failed it once can compute nothing more."""
        if not any(reading.fault is not None for reading in found):
            return self._told(phases, seconds)
        again, end = self._whole(seconds + START_SECONDS, phases)
        return again if end is None else [*again, end]

    def _told(self, phases: Sequence[str], seconds: float) -> list[Reading]:
        """What comes of asking some phases anew, the worker's end among it; nothing where it has ended before."""
        worker = self._worker
        if worker is None:
            return []
        count = len(worker.received.readings)
        worker.ask_again(phases, seconds)
        end = self._listen(worker, seconds)
        found = worker.received.readings[count:]
        return found if end is None else [*found, end]

    def _end_of(self, worker: Worker) -> Reading:
        """How it ended, as a fault of the device: what the probes ask, a healthy one survives.

        But for its host: that ends a process when its memory has run out, whatever device it uses, and is slow itself.
        """
        phase = worker.received.phase
        self._leave()
        self._has_hung = worker.code is None
        is_slow = self._has_hung and (self.device == "cpu" or phase in _BEFORE)
        end, why = Reading(phase, PROCESS, self.device, "", None), worker.fault()
        is_hosts = is_slow or worker.code == -signal.SIGKILL
        return replace(end, why_not=why) if is_hosts else replace(end, fault=why)

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
