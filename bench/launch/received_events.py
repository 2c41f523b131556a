"""Collects the events that the parent receives from a worker, and explains an end without a result."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.core import worker_events
from bench.core.result import Phases, Sample, Status, Work
from bench.core.worker_events import (
    CapabilitiesRead,
    CardOpened,
    CaseMeasured,
    DeviceCapabilities,
    DeviceExamined,
    PhaseEntered,
    PhasesTimed,
    PrecisionProbe,
    PrecisionProbed,
    ReadingTaken,
    SampleTaken,
    TorchDescribed,
    WorkPredicted,
)
from provision.core.process import signal_name

if TYPE_CHECKING:
    from bench.core.validation_records import Reading
    from bench.core.worker_events import WorkerAnswer
    from bench.launch.monitor import WorkerMonitor

NOT_STARTED = 127  # as a shell has it
_HUNGRY = 0.5
_SILENT_SECONDS = 300.0  # twice what a phase of a case is silent at most, beside its images and the compiler
_IMAGES = 5  # so many times longer than foretold an image may take
_QUIET = {"load", "largest"}  # gigabytes from a slow disk, and the search of a size: their deadline ends them


@dataclass
class ReceivedEvents:
    """Hold the events of a worker so far.

    `at`: the time of the last line; `entered`: the start of the phase (both time.monotonic). `answer`: the last answer.
    `rubbish`: the number of lines that are no events.
    """

    phase: str = "start"
    at: float = field(default_factory=time.monotonic)
    entered: float = field(default_factory=time.monotonic)
    phases: Phases = field(default_factory=Phases)
    work: Work = field(default_factory=Work)
    samples: list[Sample] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    precisions: list[PrecisionProbe] = field(default_factory=list)
    capabilities: DeviceCapabilities | None = None
    answer: WorkerAnswer | None = None
    rubbish: int = 0

    @property
    def patience(self) -> float:
        """Seconds after which a silent worker hangs."""
        if self.phase in _QUIET:
            return float("inf")
        return _SILENT_SECONDS + 3 * (self.work.predicted_compile_seconds or 0.0) + _IMAGES * self._image_seconds

    @property
    def _image_seconds(self) -> float:
        """The seconds of an image, in which nothing is said: as predicted or measured, whichever is longer."""
        work, last = self.work, self.samples[-1].seconds if self.samples else 0.0
        predicted = 0.0
        if work.predicted_step_seconds and work.flops_per_step and work.flops_per_image:
            predicted = work.predicted_step_seconds * work.flops_per_image / work.flops_per_step
        return max(predicted, self.phases.first_image_seconds or 0.0, last)


def receive(received: ReceivedEvents, monitor: WorkerMonitor | None, line: bytes) -> None:  # noqa: C901 (an arm an event)
    """Take in one line; count it where it is no event."""
    received.at = time.monotonic()
    try:
        event = worker_events.decode(line)
    except ValueError:
        received.rubbish += 1
        return
    match event:
        case PhaseEntered():
            received.phase, received.entered = event.phase, time.monotonic()
            if monitor is not None:
                monitor.enter(event.phase)
        case CardOpened():
            if monitor is not None:
                monitor.found_card(event.card)
        case WorkPredicted():
            received.work = event.work
        case PhasesTimed():
            received.phases = event.phases
        case SampleTaken():
            received.samples.append(event.sample)
        case ReadingTaken():
            received.readings.append(event.reading)
        case CapabilitiesRead():
            received.capabilities = event.computes
        case PrecisionProbed():
            received.precisions.append(event.precision)
        case TorchDescribed() | DeviceExamined() | CaseMeasured():
            received.answer = event


def explain_end(received: ReceivedEvents, code: int | None, hungry: float) -> tuple[Status, str]:
    """Return what became of a case whose worker gave no result.

    Args:
        received: the events of the worker.
        code: its exit code; None where it was killed at its deadline.
        hungry: the share of its life in which it was ready and had no core.
    """
    where = f"in the phase {received.phase!r}"
    if code is None:
        why = f"starved {where}: it waited {hungry:.0%} of the time for a core" if hungry > _HUNGRY else ""
        return Status.TIMEOUT, f"the worker {why or f'hung {where}'} and was killed at its deadline"
    if code == NOT_STARTED:
        return Status.ERROR, "the worker did not start"
    if code == -signal.SIGKILL:
        return Status.OOM, f"the worker was killed {where} (SIGKILL: most likely the host's memory ran out)"
    if code < 0:
        return Status.ERROR, f"the worker died {where} ({signal_name(-code)})"
    if received.rubbish:
        lines = f"printed {received.rubbish} lines that are no answer"
        return Status.ERROR, f"the worker {lines}, and ended with exit {code}"
    return Status.ERROR, f"the worker ended {where} without a result (exit {code})"
