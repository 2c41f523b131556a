"""Defines the events that a worker sends to its parent: one record per event, one line of JSON per record."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.core.codec import dumps, plain, record
from bench.core.result import (
    Host,  # noqa: TC001 (the codec reads a record's types)
    Phases,  # noqa: TC001 (the codec reads a record's types)
    Result,  # noqa: TC001 (the codec reads a record's types)
    Sample,  # noqa: TC001 (the codec reads a record's types)
    Work,  # noqa: TC001 (the codec reads a record's types)
)
from bench.core.validation_records import Reading  # noqa: TC001 (the codec reads a record's types)

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class DeviceCapabilities:
    """Hold the vector width of a CPU, or the number formats of a GPU; None for a field of the other kind of device.

    `lanes`: the fp32 numbers in one vector instruction of the CPU. `threads`: the threads that torch uses on the CPU.
    `tf32`: 1 if the GPU has TF32, otherwise 0.
    """

    lanes: int | None = None
    threads: int | None = None
    tf32: int | None = None


@dataclass(frozen=True)
class PrecisionProbe:
    """Hold the state of the probe of one dtype: a short convolution on the device.

    `kernels`: whether torch reports kernels for the dtype; None if it reports neither. `rate`: the FLOPs a second of
    the convolution. `fault`: the first line of the error that ended the probe. `unsupported`: the error means that the
    device has no such kernel. `rate` and `fault` are None before the probe.
    """

    dtype: str
    kernels: bool | None
    rate: float | None = None
    fault: str | None = None
    unsupported: bool | None = None

    @property
    def is_finished(self) -> bool:
        """Return whether the probe has ended, that is, whether it has a rate or a fault.

        The worker sends the record twice: before the probe, with neither of them, and after the probe.
        """
        return self.rate is not None or self.fault is not None


@dataclass(frozen=True)
class ExaminationReport:
    """Hold the facts of an examination besides its readings.

    `host`: the load of the host during the phase "sustained". `software`: {name: version}. `seconds`: {phase: seconds}.
    A test of links between GPUs reports only `seconds`.
    """

    host: Host | None = None
    software: dict[str, str] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class PhaseEntered:
    """Announce the phase that the worker begins."""

    phase: str


@dataclass(frozen=True)
class CardOpened:
    """Name the GPU that the worker is about to use, by its UUID; "" if torch does not report a UUID."""

    card: str


@dataclass(frozen=True)
class WorkPredicted:
    """Report the FLOPs of the case, and its predicted time."""

    work: Work


@dataclass(frozen=True)
class PhasesTimed:
    """Report the seconds of the phases before the samples."""

    phases: Phases


@dataclass(frozen=True)
class SampleTaken:
    """Report one timed image."""

    sample: Sample


@dataclass(frozen=True)
class ReadingTaken:
    """Report one reading of a device, or of the links between devices."""

    reading: Reading


@dataclass(frozen=True)
class CapabilitiesRead:
    """Report the capabilities of the device; the probes of its dtypes follow."""

    computes: DeviceCapabilities


@dataclass(frozen=True)
class PrecisionProbed:
    """Report the state of one dtype's probe: once before the convolution, and once after it."""

    precision: PrecisionProbe


@dataclass(frozen=True)
class TorchDescribed:
    """Answer a TorchQuery with the version of torch and the devices that torch lists.

    The dict is the one that `device_probe.query` returns.
    """

    query: dict[str, Any]


@dataclass(frozen=True)
class DeviceExamined:
    """Answer an Examination or a LinkTest after its last phase; the readings were sent before."""

    examined: ExaminationReport


@dataclass(frozen=True)
class CaseMeasured:
    """Answer a CaseRequest with the result of the case."""

    result: Result


WorkerAnswer = TorchDescribed | DeviceExamined | CaseMeasured  # the last event that a request causes
WorkerEvent = (
    PhaseEntered
    | CardOpened
    | WorkPredicted
    | PhasesTimed
    | SampleTaken
    | ReadingTaken
    | CapabilitiesRead
    | PrecisionProbed
    | WorkerAnswer
)
if TYPE_CHECKING:
    Emit = Callable[[WorkerEvent], None]

# An event is a JSON object with one key: the name of the only field of its record.
_KINDS: dict[str, type[WorkerEvent]] = {dataclasses.fields(kind)[0].name: kind for kind in typing.get_args(WorkerEvent)}
_SPARSE = (DeviceCapabilities, PrecisionProbe, ExaminationReport)  # fields of these that are None are not sent


def encode(event: WorkerEvent) -> str:
    """Return an event as one line of JSON, without a line feed."""
    return dumps({field.name: _content(getattr(event, field.name)) for field in dataclasses.fields(event)})


def _content(value: object) -> Any:
    content = plain(value)
    if not isinstance(value, _SPARSE):
        return content
    optional = {field.name for field in dataclasses.fields(value) if field.default is None}
    return {name: item for name, item in content.items() if item is not None or name not in optional}


def decode(line: str | bytes) -> WorkerEvent:
    """Return the event that one line holds.

    Raises:
        ValueError: the line is not JSON, is not an event, or does not fit the record of its event.
    """
    try:
        content = json.loads(line)
        key = next((name for name in _KINDS if name in content), None) if isinstance(content, dict) else None
        if key is None:
            raise ValueError("the line is not an event")
        event: WorkerEvent = record({key: content[key]}, _KINDS[key], "event")
    except RecursionError:  # brackets nested a thousand deep
        raise ValueError("the line is nested too deeply") from None
    return event
