"""Defines the requests that the parent sends to a worker, the names of the phases, and the control lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bench.core.codec import plain, record
from bench.core.result import Case  # noqa: TC001 (the codec reads a record's types)

# The phases of an examination, in their order; the worker has a check for each.
PHASES = ("numerics", "product", "convolution", "copy", "pinned", "memory", "sustained", "threads", "loop")
WAITING = "waiting"  # the phase of a worker that waits for a control line or, after a Preparation, for a CaseRequest

GO = "go"  # the control line for one more image of a paced worker
_AGAIN = "again"


@dataclass(frozen=True)
class TorchQuery:
    """Request the version of torch and the devices that it sees."""


@dataclass(frozen=True)
class PrecisionQuery:
    """Request a probe of each dtype on one device. `cpus`: the CPU quota of the control group; None without one."""

    device: str
    dtypes: tuple[str, ...]
    cpus: float | None


@dataclass(frozen=True)
class Preparation:
    """Request the import of a case's libraries.

    The worker then enters the phase WAITING, and waits for a CaseRequest.
    """


@dataclass(frozen=True)
class Examination:
    """Request an examination of one device.

    `budget_seconds` count from `asked_at` (time.time of the parent), so they include the start of the process.
    `probes`: the phases to run, in the order of PHASES; empty for all of them.
    """

    device: str
    asked_at: float
    budget_seconds: float
    probes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LinkTest:
    """Request a test of the links between devices; `budget_seconds` count from `asked_at` (time.time of the parent)."""

    devices: tuple[str, ...]
    asked_at: float
    budget_seconds: float


@dataclass(frozen=True)
class CaseRequest:
    """Request the measurement of one case.

    Both time limits count from `asked_at` (time.time of the parent), so they include the start of the process. After
    `share_seconds` no further sample begins; a case that cannot end within `limit_seconds` is skipped.

    `weights`: {architecture: snapshot folder}, empty for random weights. `image`: the path for the picture.
    `rate_known`: FLOPs a second that the device has reached in this dtype before; a probe that measures less was
    disturbed. `rate_fp32`: the same in fp32. `paced`: each image waits for a line "go" on stdin; any other line, or the
    end of stdin, ends the sampling. `compare`: compare one evaluation with that of fp32. `find_max`: search the largest
    batch and image. `checks_seconds`: the time limit of the checks after the samples, if it is below `limit_seconds`.
    `cpus`: the CPU quota of the control group; None without one.
    """

    case: Case
    asked_at: float
    share_seconds: float
    limit_seconds: float
    weights: dict[str, str]
    image: str | None
    paced: bool = False
    compare: bool = True
    find_max: bool = False
    rate_known: float | None = None
    rate_fp32: float | None = None
    checks_seconds: float | None = None
    cpus: float | None = None


WorkerRequest = TorchQuery | PrecisionQuery | Preparation | Examination | LinkTest | CaseRequest


def encode(request: WorkerRequest) -> str:
    """Return a request as one line of JSON, without the end of the line."""
    content: dict[str, Any]
    match request:
        case TorchQuery():
            content = {"query": True}
        case PrecisionQuery():
            content = {"precisions": request.device, "dtypes": request.dtypes, "cpus": request.cpus}
        case Preparation():
            content = {"prepare": True}
        case Examination():
            content = {"examine": plain(request)}
        case LinkTest():
            content = {"links": plain(request)}
        case CaseRequest():
            content = plain(request)
    return json.dumps(content)


def decode(line: str) -> WorkerRequest:
    """Return the request of one line.

    Raises:
        ValueError: the line is not JSON, or does not fit the request's record.
    """
    content = json.loads(line)
    kind: type[WorkerRequest] = CaseRequest
    fields = content
    if content == {"query": True}:
        kind, fields = TorchQuery, {}
    elif content == {"prepare": True}:
        kind, fields = Preparation, {}
    elif "precisions" in content:
        kind, fields = PrecisionQuery, {"device" if name == "precisions" else name: content[name] for name in content}
    elif "examine" in content:
        kind, fields = Examination, content["examine"]
    elif "links" in content:
        kind, fields = LinkTest, content["links"]
    request: WorkerRequest = record(fields, kind, kind.__name__)
    return request


@dataclass(frozen=True)
class RepeatPhases:
    """Repeat some phases of an examination within `seconds`; this is a control line, not a request."""

    phases: tuple[str, ...]
    seconds: float

    @property
    def line(self) -> str:
        """Return the control line, without the end of the line."""
        return f"{_AGAIN} {self.seconds:g} {' '.join(self.phases)}"


def decode_repeat_phases(line: str) -> RepeatPhases | None:
    """Return the phases of a control line "again SECONDS PHASE ..."; None for any other line.

    Raises:
        ValueError: the line has no seconds.
    """
    keyword, *rest = line.split() or [""]
    if keyword != _AGAIN:
        return None
    seconds, *phases = rest
    return RepeatPhases(tuple(phases), float(seconds))
