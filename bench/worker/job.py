"""Defines what every stage of a measurement receives: the request, the deadlines, and the result so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.core.result import Case, Result
    from bench.core.worker_events import Emit
    from bench.core.worker_requests import CaseRequest


class PartialResult:
    """Hold the result of a case so far, which survives a stage that fails.

    Stages add to it, and read nothing from it.
    """

    def __init__(self, result: Result) -> None:
        self.result = result

    def add(self, **fields: Any) -> None:
        """Set fields of the result."""
        self.result = replace(self.result, **fields)


@dataclass(frozen=True)
class Deadlines:
    """Hold the deadlines of the samples, the checks and the case (time.perf_counter).

    No further sample begins after `samples`.
    """

    samples: float
    checks: float
    case: float


@dataclass(frozen=True)
class Job:
    """Hold the input of every stage: the request, the receiver of events, the result so far, and the deadlines."""

    request: CaseRequest
    emit: Emit
    so_far: PartialResult
    deadlines: Deadlines

    @property
    def case(self) -> Case:
        """Return the case of the request."""
        return self.request.case
