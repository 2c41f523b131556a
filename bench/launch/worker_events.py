"""Reads a worker's events line by line, and explains why one ended without a result."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.core.codec import record
from bench.core.result import Phases, Sample, Status, Work
from bench.core.validation_records import Reading
from provision.core.process import signal_name

if TYPE_CHECKING:
    from bench.launch.monitor import WorkerMonitor

NOT_STARTED = 127  # as a shell has it
_ANSWERS = {"result", "query", "examined"}
_FACTS = {"precision", "computes"}
_HUNGRY = 0.5
_SILENT_SECONDS = 300.0  # twice what a phase of a case is silent at most, beside its images and the compiler
_IMAGES = 5  # so many times longer than foretold an image may take
_QUIET = {"load", "largest"}  # gigabytes from a slow disk, and the search of a size: their deadline ends them


@dataclass
class WorkerEvents:
    """Hold the events of a worker so far, the time of the last one, and the start of its phase (time.monotonic)."""

    phase: str = "start"
    at: float = field(default_factory=time.monotonic)
    entered: float = field(default_factory=time.monotonic)
    phases: Phases = field(default_factory=Phases)
    work: Work = field(default_factory=Work)
    samples: list[Sample] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    precisions: list[dict[str, Any]] = field(default_factory=list)
    computes: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] | None = None
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


def hear(heard: WorkerEvents, watch: WorkerMonitor | None, line: bytes) -> None:
    """Take in one line; what is no answer is counted."""
    heard.at = time.monotonic()
    try:
        event = json.loads(line)
        if not isinstance(event, dict) or not _is_understood(heard, watch, event):
            heard.rubbish += 1
    except (ValueError, TypeError, RecursionError):  # rubbish may be nested a thousand deep
        heard.rubbish += 1


def _is_understood(heard: WorkerEvents, watch: WorkerMonitor | None, event: dict[str, Any]) -> bool:  # noqa: C901 (an arm an event)
    if "phase" in event:
        heard.phase, heard.entered = str(event["phase"]), time.monotonic()
        if watch is not None:
            watch.enter(heard.phase)
    elif "card" in event:
        if watch is not None:
            watch.found_card(str(event["card"]))
    elif "work" in event:
        heard.work = record(event["work"], Work, "work")
    elif "phases" in event:
        heard.phases = record(event["phases"], Phases, "phases")
    elif "sample" in event:
        heard.samples.append(record(event["sample"], Sample, "sample"))
    elif "reading" in event:
        heard.readings.append(record(event["reading"], Reading, "reading"))
    elif _FACTS & set(event):
        heard.precisions += [dict(event[name]) for name in event if name == "precision"]
        heard.computes |= event.get("computes", {})
    elif _ANSWERS & set(event):
        heard.answer = event
    else:
        return False
    return True


def autopsy(heard: WorkerEvents, code: int | None, hungry: float) -> tuple[Status, str]:
    """Return what became of a case whose worker gave no result.

    Args:
        heard: what it said.
        code: its exit code; None where it was killed at its deadline.
        hungry: the share of its life in which it was ready and had no core.
    """
    where = f"in the phase {heard.phase!r}"
    if code is None:
        why = f"starved {where}: it waited {hungry:.0%} of the time for a core" if hungry > _HUNGRY else ""
        return Status.TIMEOUT, f"the worker {why or f'hung {where}'} and was killed at its deadline"
    if code == NOT_STARTED:
        return Status.ERROR, "the worker did not start"
    if code == -signal.SIGKILL:
        return Status.OOM, f"the worker was killed {where} (SIGKILL: most likely the host's memory ran out)"
    if code < 0:
        return Status.ERROR, f"the worker died {where} ({signal_name(-code)})"
    rubbish = f"printed {heard.rubbish} lines that are no answer, and ended with exit {code}"
    return Status.ERROR, f"the worker {rubbish if heard.rubbish else f'ended {where} without a result (exit {code})'}"
