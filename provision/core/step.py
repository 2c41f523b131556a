"""Look, decide, act, look again: what a step is, and the engine that runs a list of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from provision.core.errors import BlockedError, Exit, FirstlightError, from_os_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class State(str, Enum):
    """How a step stands."""

    OK = "ok"
    DRIFTED = "drifted"
    BLOCKED = "blocked"


@dataclass(frozen=True)
class Check:
    """What a look found.

    `fallback` is said to the user wherever something second-best stands in, also when the state is OK.
    """

    state: State
    detail: str
    fallback: str | None = None


class Step(Protocol):
    """One thing that the host should have.

    `essential`: without it no later step can stand. `local`: it needs no network, so repair may do it.
    """

    name: str
    essential: bool
    local: bool

    def describe(self) -> str:
        """The plan's line: what would be done."""

    def check(self, *, deep: bool = False) -> Check:
        """Look; never write. `deep` adds hashes and real runs."""

    def apply(self) -> None:
        """Do it; called only when the look said DRIFTED."""


@dataclass(frozen=True)
class Outcome:
    """What became of one step."""

    step: str
    before: State
    after: State
    changed: bool
    detail: str
    seconds: float
    error: str | None = None
    fallback: str | None = None
    exit: Exit = Exit.GOOD


def look(steps: Sequence[Step], *, deep: bool = False, listen: Callable[[Step, Outcome | None], None]) -> list[Outcome]:
    """Check every step and change nothing."""
    outcomes = []
    for step in steps:
        listen(step, None)
        outcome = _look(step, deep=deep)
        listen(step, outcome)
        outcomes.append(outcome)
    return outcomes


def converge(
    steps: Sequence[Step], *, listen: Callable[[Step, Outcome | None], None], guard: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Check each step, apply what has drifted, check again; stop where an essential one cannot stand.

    Args:
        steps: in their order.
        listen: told when a step begins (None) and what became of it.
        guard: raises where nothing may be written any more; asked before every step but the essential ones.
    """
    outcomes = []
    for step in steps:
        listen(step, None)
        outcome = _converge(step, guard)
        listen(step, outcome)
        outcomes.append(outcome)
        if step.essential and outcome.after is not State.OK:
            break
    return outcomes


def exit_of(outcomes: Sequence[Outcome]) -> Exit:
    """The exit code of a whole run: the first failure's, else changes pending, else good."""
    for outcome in outcomes:
        if outcome.exit not in {Exit.GOOD, Exit.CHANGES}:
            return outcome.exit
    return max((outcome.exit for outcome in outcomes), default=Exit.GOOD)


def _look(step: Step, *, deep: bool) -> Outcome:
    started = time.perf_counter()
    try:
        found = step.check(deep=deep)
    except (FirstlightError, OSError) as error:
        return _failed(step, State.BLOCKED, error, started)
    codes = {State.OK: Exit.GOOD, State.DRIFTED: Exit.CHANGES, State.BLOCKED: Exit.BLOCKED}
    return Outcome(
        step.name,
        before=found.state,
        after=found.state,
        changed=False,
        detail=found.detail,
        seconds=time.perf_counter() - started,
        error=found.detail if found.state is State.BLOCKED else None,
        fallback=found.fallback,
        exit=codes[found.state],
    )


def _converge(step: Step, guard: Callable[[], None]) -> Outcome:
    started = time.perf_counter()
    first = _look(step, deep=False)
    if first.before is not State.DRIFTED:
        return first
    try:
        if not step.essential:
            guard()
        step.apply()
        found = step.check()
    except (FirstlightError, OSError) as error:
        return _failed(step, State.DRIFTED, error, started)
    error_text = None
    code = Exit.GOOD
    if found.state is not State.OK:
        error_text = f"still {found.state.value} after it was applied: {found.detail}"
        code = Exit.BLOCKED if found.state is State.BLOCKED else Exit.FAILED
    return Outcome(
        step.name,
        before=State.DRIFTED,
        after=found.state,
        changed=True,
        detail=found.detail,
        seconds=time.perf_counter() - started,
        error=error_text,
        fallback=found.fallback,
        exit=code,
    )


def _failed(step: Step, before: State, error: FirstlightError | OSError, started: float) -> Outcome:
    known = error if isinstance(error, FirstlightError) else from_os_error(error)
    return Outcome(
        step.name,
        before=before,
        after=State.BLOCKED if isinstance(known, BlockedError) else before,
        changed=False,
        detail=str(known),
        seconds=time.perf_counter() - started,
        error=str(known),
        exit=known.exit,
    )
