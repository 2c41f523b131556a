"""Defines the verdict of a run, the judgements that decide it, and its exit code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from bench.core.errors import Exit

if TYPE_CHECKING:
    from collections.abc import Sequence


class VerdictState(str, Enum):
    """Name the verdicts of a run; one judgement has one of the same states."""

    PASS = "pass"  # noqa: S105 (a verdict)
    WARN = "warn"
    FAIL = "fail"
    NOT_JUDGED = "could not judge"


@dataclass(frozen=True)
class Verdict:
    """Record the verdict of a whole run and the reasons for it."""

    state: VerdictState
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """Record what one rule concludes about a device.

    `rule`: the name of the rule in rules.toml. `said`: one sentence with the value, the expected value and its source.
    `advice`: what the user can do. `value`, `expected`: the reading and the expected value, in `unit`. `source`: the
    source of the expected value. `confidence`: "own" (the best kept validation of this very GPU), "measured" (measured
    on GPUs of its kind), "sheet" (data sheet), or "unchecked" (a figure that no source confirms).
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
    """Return one verdict for all judgements.

    The text of each judgement that is not "pass" is a reason, the worst first.

    The first of "fail", "could not judge" and "warn" that a judgement has is the verdict. "Could not judge" goes before
    "warn", since a warning alone would look like a verdict on the whole host.
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
    """Return the exit code of a verdict.

    Args:
        verdict: the verdict.
        strict: turn a verdict of "warn" into exit code 5 instead of 0.
    """
    codes = {
        VerdictState.PASS: Exit.GOOD,
        VerdictState.WARN: Exit.NOT_JUDGED if strict else Exit.GOOD,
        VerdictState.FAIL: Exit.VERDICT_FAIL,
        VerdictState.NOT_JUDGED: Exit.NOT_JUDGED,
    }
    return codes[verdict.state]
