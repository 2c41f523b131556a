"""Defines the input of every stage of a measurement: the request, the deadlines, and the result so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.core.result import Case, Result
    from bench.core.worker_events import Emit
    from bench.core.worker_requests import CaseRequest


class PartialResult:
    """Hold the result of a case so far. It is kept if a stage fails.

    Stages add fields to it, and read nothing from it.
    """

    def __init__(self, result: Result) -> None:
        self.result = result

    def add(self, **fields: Any) -> None:
        """Set these fields of the result."""
        self.result = replace(self.result, **fields)


@dataclass(frozen=True)
class Deadlines:
    """Hold the deadlines of a case as times of time.perf_counter.

    After `samples` no further sample begins. After `checks` no further check begins. At `case` the case must have
    ended.
    """

    samples: float
    checks: float
    case: float


@dataclass(frozen=True)
class Job:
    """Hold the input of every stage: the request, the function that sends events, the result so far, the deadlines."""

    request: CaseRequest
    emit: Emit
    so_far: PartialResult
    deadlines: Deadlines

    @property
    def case(self) -> Case:
        """Return the case of the request."""
        return self.request.case
