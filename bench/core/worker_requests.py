"""Defines the requests and control lines that the parent sends to a worker, and the phases of an examination."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bench.core.codec import plain, record
from bench.core.result import Case  # noqa: TC001 (the codec reads a record's types)

# The phases of an examination, in their order; the worker has a check for each.
PHASES = ("numerics", "product", "convolution", "copy", "pinned", "memory", "sustained", "threads", "loop")
WAITING = "waiting"  # the phase in which a worker waits for a control line or, after a Preparation, for a CaseRequest

GO = "go"  # the control line upon which a worker with a paced CaseRequest makes one image
_AGAIN = "again"


@dataclass(frozen=True)
class TorchQuery:
    """Request the version of torch and the devices that torch lists."""


@dataclass(frozen=True)
class PrecisionQuery:
    """Request a probe of each dtype on one device.

    `cpus`: the CPU quota of the control group, in cores; None without a quota.
    """

    device: str
    dtypes: tuple[str, ...]
    cpus: float | None


@dataclass(frozen=True)
class Preparation:
    """Request the import of the libraries that a case needs.

    The worker then enters the phase WAITING and waits for a CaseRequest.
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
    """Request a test of the links between GPUs.

    `budget_seconds` count from `asked_at` (time.time of the parent), so they include the start of the process.
    """

    devices: tuple[str, ...]
    asked_at: float
    budget_seconds: float


@dataclass(frozen=True)
class CaseRequest:
    """Request the measurement of one case.

    Both time limits count from `asked_at` (time.time of the parent), so they include the start of the process. After
    `share_seconds`, the case's share of the run's budget, no further sample begins. A case that cannot end within
    `limit_seconds` is skipped.

    `weights`: {architecture: snapshot folder}; empty for random weights. `image`: the file into which the image is
    written; None writes none. `paced`: the worker makes one image for each line "go" on stdin; any other line, or the
    end of stdin, ends the samples. `compare`: compare one evaluation of the model with the same evaluation in fp32.
    `find_max`: search the largest batch and the largest image. `rate_known`: the FLOPs a second that this device has
    reached in this dtype before in this run; other work disturbed a probe that measures less. `rate_fp32`: the same in
    fp32. `checks_seconds`: the time limit of the checks after the samples, if it is below `limit_seconds`. `cpus`: the
    CPU quota of the control group, in cores; None without a quota.
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
    """Return a request as one line of JSON, without a line feed."""
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
    """Return the request that one line holds.

    Raises:
        ValueError: the line is not JSON, or does not fit the record of its request.
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
    """Request from an examining worker that it repeats some phases within `seconds`.

    It is sent as a control line while the worker waits, and not as a request.
    """

    phases: tuple[str, ...]
    seconds: float

    @property
    def line(self) -> str:
        """Return the control line "again SECONDS PHASE ...", without a line feed."""
        return f"{_AGAIN} {self.seconds:g} {' '.join(self.phases)}"


def decode_repeat_phases(line: str) -> RepeatPhases | None:
    """Return the record of a control line "again SECONDS PHASE ..."; None for any other line.

    Raises:
        ValueError: the line has no seconds.
    """
    keyword, *rest = line.split() or [""]
    if keyword != _AGAIN:
        return None
    seconds, *phases = rest
    return RepeatPhases(tuple(phases), float(seconds))
