"""Defines the requests that the parent sends to a worker, the names of the phases, and the control lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bench.core.codec import plain, record
from bench.core.result import Case  # noqa: TC001 (the codec reads a record's types)

# The phases of an examination, in their order; the worker has a check for each.
PHASES = ("numerics", "product", "convolution", "copy", "pinned", "memory", "sustained", "threads", "loop")
WAITING = "waiting"  # the phase of a worker that has examined its device and may be told to do so again

GO = "go"  # the control line for one more image of a paced worker
_AGAIN = "again"


@dataclass(frozen=True)
class TorchQuery:
    """Request the version of torch and the devices that it sees."""


@dataclass(frozen=True)
class PrecisionQuery:
    """Request a probe of each dtype on one device. `cpus`: how many the control group grants, if it does."""

    device: str
    dtypes: tuple[str, ...]
    cpus: float | None


@dataclass(frozen=True)
class Examination:
    """Request an examination of one device.

    `budget_seconds` count from `asked_at` (time.time of the parent): starting the process is part of them. `probes`:
    the phases that are wanted, in the order of PHASES; all, where it is empty.
    """

    device: str
    asked_at: float
    budget_seconds: float
    probes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Linking:
    """Request a test of the links between devices; `budget_seconds` count from `asked_at` (time.time of the parent)."""

    devices: tuple[str, ...]
    asked_at: float
    budget_seconds: float


@dataclass(frozen=True)
class Request:
    """Request the measurement of one case.

    Both times count from `asked_at` (time.time of the parent): starting the process is part of them. After
    `share_seconds` no further sample is begun; a case that cannot end within `limit_seconds` is skipped.
    `weights`: {architecture: snapshot folder}, empty for random ones. `rate_known`: FLOPs a second that the device has
    reached in this dtype before: a probe that finds less was disturbed. `rate_fp32`: the same in fp32. `paced`: each
    image waits for a line "go" on stdin, and any other line, or its end, ends them. `compare`: hold one evaluation
    against fp32's. `find_max`: search the largest batch and image. `checks_seconds`: the checks after the samples end
    within that, where it is less than the limit. `cpus`: how many the control group grants, if it does.
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


WorkerRequest = TorchQuery | PrecisionQuery | Examination | Linking | Request


def encode(request: WorkerRequest) -> str:
    """Return a request as one line of JSON, without the end of the line."""
    content: dict[str, Any]
    match request:
        case TorchQuery():
            content = {"query": True}
        case PrecisionQuery():
            content = {"precisions": request.device, "dtypes": request.dtypes, "cpus": request.cpus}
        case Examination():
            content = {"examine": plain(request)}
        case Linking():
            content = {"links": plain(request)}
        case Request():
            content = plain(request)
    return json.dumps(content)


def decode(line: str) -> WorkerRequest:
    """Return the request of one line.

    Raises:
        ValueError: the line is no JSON, or does not fit the request's record.
    """
    content = json.loads(line)
    kind: type[WorkerRequest] = Request
    fields = content
    if content == {"query": True}:
        kind, fields = TorchQuery, {}
    elif "precisions" in content:
        kind, fields = PrecisionQuery, {"device" if name == "precisions" else name: content[name] for name in content}
    elif "examine" in content:
        kind, fields = Examination, content["examine"]
    elif "links" in content:
        kind, fields = Linking, content["links"]
    request: WorkerRequest = record(fields, kind, kind.__name__)
    return request


@dataclass(frozen=True)
class Again:
    """Let an examining worker run some phases once more, within `seconds`; a control line, not a request."""

    phases: tuple[str, ...]
    seconds: float

    @property
    def line(self) -> str:
        """Return the control line, without its end."""
        return f"{_AGAIN} {self.seconds:g} {' '.join(self.phases)}"


def decode_again(line: str) -> Again | None:
    """Return the phases of a control line "again SECONDS PHASE ..."; None for any other line.

    Raises:
        ValueError: the line has no seconds.
    """
    word, *rest = line.split() or [""]
    if word != _AGAIN:
        return None
    seconds, *phases = rest
    return Again(tuple(phases), float(seconds))
