"""Defines the requests that the parent sends to a worker, the names of the phases, and the control words."""

from __future__ import annotations

from dataclasses import dataclass

from bench.core.result import Case  # noqa: TC001 (the codec reads a record's types)

AGAIN = "again"


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


# The phases of an examination, in their order; the worker has a check for each.
PHASES = ("numerics", "product", "convolution", "copy", "pinned", "memory", "sustained", "threads", "loop")
WAITING = "waiting"  # the phase of a worker that has examined its device and may be told to do so again

GO = "go"


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
