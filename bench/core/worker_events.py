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

    `lanes`: fp32 numbers in one vector instruction. `threads`: the threads that torch uses. `tf32`: 1 if the GPU has
    TF32, otherwise 0.
    """

    lanes: int | None = None
    threads: int | None = None
    tf32: int | None = None


@dataclass(frozen=True)
class PrecisionProbe:
    """Hold the state of one dtype's probe.

    `kernels`: whether torch reports kernels for the dtype; None if torch does not report it. `rate`: FLOPs a second of
    a short convolution. `fault`: the first line of the error that ended the probe. `unsupported`: that error means that
    the device has no such kernel.
    """

    dtype: str
    kernels: bool | None
    rate: float | None = None
    fault: str | None = None
    unsupported: bool | None = None

    @property
    def is_finished(self) -> bool:
        """Return whether the probe has ended, so that it has a rate or a fault.

        The worker sends the record once before the probe, with neither, and again after it.
        """
        return self.rate is not None or self.fault is not None


@dataclass(frozen=True)
class ExaminationReport:
    """Hold the facts of an examination besides its readings.

    `host`: the load of the host during the sustained phase. `software`: {name: version}. `seconds`: {phase: seconds}.
    A test of links reports only seconds.
    """

    host: Host | None = None
    software: dict[str, str] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class PhaseEntered:
    """Announce the phase that begins."""

    phase: str


@dataclass(frozen=True)
class CardOpened:
    """Name the GPU that the worker is about to use, by its UUID ("" if torch does not give one)."""

    card: str


@dataclass(frozen=True)
class WorkPredicted:
    """Report the arithmetic of the case and its predicted cost."""

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
    """Report the capabilities of the device whose dtypes are probed."""

    computes: DeviceCapabilities


@dataclass(frozen=True)
class PrecisionProbed:
    """Report the state of one dtype's probe: first the kernels, then the rate or the error."""

    precision: PrecisionProbe


@dataclass(frozen=True)
class TorchDescribed:
    """Answer a TorchQuery: the version of torch and the devices that it sees, as `device_probe.query` returns them."""

    query: dict[str, Any]


@dataclass(frozen=True)
class DeviceExamined:
    """Answer an Examination or a LinkTest: all its phases are complete."""

    examined: ExaminationReport


@dataclass(frozen=True)
class CaseMeasured:
    """Answer a CaseRequest: the result of the case."""

    result: Result


WorkerAnswer = TorchDescribed | DeviceExamined | CaseMeasured  # the last event of a request
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
_SPARSE = (DeviceCapabilities, PrecisionProbe, ExaminationReport)  # their fields without a value are left out


def encode(event: WorkerEvent) -> str:
    """Return an event as one line of JSON, without the end of the line."""
    return dumps({field.name: _content(getattr(event, field.name)) for field in dataclasses.fields(event)})


def _content(value: object) -> Any:
    content = plain(value)
    if not isinstance(value, _SPARSE):
        return content
    optional = {field.name for field in dataclasses.fields(value) if field.default is None}
    return {name: item for name, item in content.items() if item is not None or name not in optional}


def decode(line: str | bytes) -> WorkerEvent:
    """Return the event of one line.

    Raises:
        ValueError: the line is not JSON, is not an event, or does not fit the event's record.
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
