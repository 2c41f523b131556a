"""Defines the verdict of a run, the judgements that decide it, and its exit code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from bench.core.errors import Exit

if TYPE_CHECKING:
    from collections.abc import Sequence


class VerdictState(str, Enum):
    """Name the verdicts of a run or of one judgement."""

    PASS = "pass"  # noqa: S105 (a verdict)
    WARN = "warn"
    FAIL = "fail"
    NOT_JUDGED = "could not judge"


@dataclass(frozen=True)
class Verdict:
    """Record the judgement of a whole run and the reasons for this judgement."""

    state: VerdictState
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """Record what one rule concludes about a device.

    `said`: the figure, the expected figure and its origin. `advice`: what to do. `source`: the source of the expected
    figure. `confidence`: "own" (the best kept run of this very GPU), "measured", "sheet" (data sheet), or "unchecked".
    """

    rule: str
    device: str
    state: VerdictState
    said: str
    advice: str = ""
    value: float | None = None
    expected: float | None = None
    unit: str = ""
    source: str | None = None
    confidence: str | None = None


_ORDER = (VerdictState.FAIL, VerdictState.NOT_JUDGED, VerdictState.WARN)


def conclude(judgements: Sequence[Judgement]) -> Verdict:
    """Return one verdict for all judgements, with their reasons, the worst first.

    One failure fails the host. Otherwise one "could not judge" makes the verdict "could not judge", even if there are
    warnings: a verdict on a part of the host must not be taken for one on the whole host.
    """
    reasons = [
        " ".join(filter(None, (f"{judgement.device}: {judgement.said}.", judgement.advice)))
        for state in _ORDER
        for judgement in judgements
        if judgement.state is state
    ]
    states = {judgement.state for judgement in judgements}
    return Verdict(next((state for state in _ORDER if state in states), VerdictState.PASS), tuple(reasons))


def exit_code(verdict: Verdict, *, strict: bool = False) -> Exit:
    """Return the exit code of a verdict; with `strict` a warning is 5."""
    codes = {
        VerdictState.PASS: Exit.GOOD,
        VerdictState.WARN: Exit.NOT_JUDGED if strict else Exit.GOOD,
        VerdictState.FAIL: Exit.VERDICT_FAIL,
        VerdictState.NOT_JUDGED: Exit.NOT_JUDGED,
    }
    return codes[verdict.state]
