"""Holds what every stage of a measurement shares: the request, the deadlines, and the result so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.core.protocol import Request
    from bench.core.result import Case, Result
    from bench.core.worker_events import Emit


class PartialResult:
    """The result of a case so far: it outlives a stage that fails. Stages add to it, and read nothing from it."""

    def __init__(self, result: Result) -> None:
        self.result = result

    def add(self, **fields: Any) -> None:
        """Set fields of the result."""
        self.result = replace(self.result, **fields)


@dataclass(frozen=True)
class Deadlines:
    """When no further sample begins, when the checks have to end, and when the case has to (time.perf_counter)."""

    samples: float
    checks: float
    case: float


@dataclass(frozen=True)
class Job:
    """What every stage has: the request, the receiver of events, the result so far, and the deadlines."""

    request: Request
    emit: Emit
    so_far: PartialResult
    deadlines: Deadlines

    @property
    def case(self) -> Case:
        """Return the case of the request."""
        return self.request.case
