"""Collects the events that a worker sends, and explains the end of a worker that sent no result."""

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

NOT_STARTED = 127  # the exit code of a shell for a missing program
_STARVED_SHARE = 0.5
_SILENT_SECONDS = 300.0  # twice the longest time without an event, apart from images and compilation
_IMAGES = 5  # a worker counts as hung after this many times the seconds of an image
_UNLIMITED = {
    "load",
    "largest",
}  # the disk may be slow, and the search for the largest image sends no events: only the deadline ends these phases


@dataclass
class ReceivedEvents:
    """Hold what a worker has sent so far.

    `phase`: the phase that the worker has begun last; `entered`: the time of its begin. `at`: the time of the last
    line. Both are times of time.monotonic. `phases`: the seconds of the phases before the samples. `answer`: the last
    event of the request; None until it arrives. `invalid_lines`: the number of lines that are not events.
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
    invalid_lines: int = 0

    @property
    def silence_limit_seconds(self) -> float:
        """Return the seconds without an event after which a worker in this phase counts as hung.

        Infinity for some phases.
        """
        if self.phase in _UNLIMITED:
            return float("inf")
        return _SILENT_SECONDS + 3 * (self.work.predicted_compile_seconds or 0.0) + _IMAGES * self._image_seconds

    @property
    def _image_seconds(self) -> float:
        """Return the seconds of one image: predicted or measured, whichever is longer.

        No event is sent during an image.
        """
        work, last = self.work, self.samples[-1].seconds if self.samples else 0.0
        predicted = 0.0
        if work.predicted_step_seconds and work.flops_per_step and work.flops_per_image:
            predicted = work.predicted_step_seconds * work.flops_per_image / work.flops_per_step
        return max(predicted, self.phases.first_image_seconds or 0.0, last)


def receive(received: ReceivedEvents, monitor: WorkerMonitor | None, line: bytes) -> None:  # noqa: C901 (one case per event)
    """Add the event that a line holds to `received`, and pass it on to the monitor.

    Count a line that is not an event.
    """
    received.at = time.monotonic()
    try:
        event = worker_events.decode(line)
    except ValueError:
        received.invalid_lines += 1
        return
    match event:
        case PhaseEntered():
            received.phase, received.entered = event.phase, time.monotonic()
            if monitor is not None:
                monitor.enter(event.phase)
        case CardOpened():
            if monitor is not None:
                monitor.open_card(event.card)
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


def explain_end(received: ReceivedEvents, code: int | None, starved_share: float) -> tuple[Status, str]:
    """Return the status and the reason for a case whose worker has ended without a result.

    Args:
        received: the events that the worker has sent.
        code: the exit code of the worker; None if it was killed at its deadline.
        starved_share: the share of its lifetime in which it was ready to run and waited for a core.
    """
    where = f"in the phase {received.phase!r}"
    if code is None:
        is_starved = starved_share > _STARVED_SHARE
        why = (
            f"starved {where}: it waited {starved_share:.0%} of the time for a core" if is_starved else f"hung {where}"
        )
        return Status.TIMEOUT, f"the worker {why} and was killed at its deadline"
    if code == NOT_STARTED:
        return Status.ERROR, "the worker did not start"
    if code == -signal.SIGKILL:
        return Status.OOM, f"the worker was killed {where} (SIGKILL: most likely the host ran out of memory)"
    if code < 0:
        return Status.ERROR, f"the worker died {where} ({signal_name(-code)})"
    if received.invalid_lines:
        lines = f"printed {received.invalid_lines} lines that are not events"
        return Status.ERROR, f"the worker {lines}, and ended with exit code {code}"
    return Status.ERROR, f"the worker ended {where} without a result (exit code {code})"
