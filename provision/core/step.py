"""Defines a step of setup, and runs lists of steps: checks each step, applies it if it has drifted, checks it again."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from provision.core.errors import BlockedError, Exit, FirstlightError, LostLockError, from_os_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class State(str, Enum):
    """Name the results of a check: OK, DRIFTED (setup has work to do) or BLOCKED (setup cannot do the work)."""

    OK = "ok"
    DRIFTED = "drifted"
    BLOCKED = "blocked"


@dataclass(frozen=True)
class Check:
    """Hold the result of a check: the state, and `detail`, a text for the user about the state.

    `fallback` describes a fallback in use, such as another build or a stand-in; None: none is in use. It is shown even
    if the state is OK.
    """

    state: State
    detail: str
    fallback: str | None = None


class Step(Protocol):
    """Describe one thing that setup makes true on a host.

    `essential`: no later step can succeed if this step fails. `local`: the step needs no network, so `repair` may apply
    it.
    """

    name: str
    essential: bool
    local: bool

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""

    def check(self, *, deep: bool = False) -> Check:
        """Return the state without any write; with `deep`, also hash files and run programs."""

    def apply(self) -> None:
        """Do the work; called only after `check` has returned DRIFTED."""


@runtime_checkable
class RetryStep(Protocol):
    """Describe a step that can be applied again although its check returns OK, such as a pull that has a stand-in.

    `retry_reason` is called in the check before `apply` and not in the check after it, so that one run tries once.
    """

    def retry_reason(self) -> str | None:
        """Return why the step is to be applied again, such as "hub A answers now"; None: it is not to be applied."""


@dataclass(frozen=True)
class Outcome:
    """Hold the result of one step in a run.

    `before` and `after` are the states before and after `apply`; `changed` is True if `apply` and the second check
    ended without an error. `seconds` is the duration of the step. `error` is the message of a failure, or None. `exit`
    is the exit code for this step alone.
    """

    step: str
    before: State
    after: State
    changed: bool
    detail: str
    seconds: float
    error: str | None = None
    fallback: str | None = None
    exit: Exit = Exit.GOOD


def check_all(
    steps: Sequence[Step], *, deep: bool = False, listen: Callable[[Step, Outcome | None], None]
) -> list[Outcome]:
    """Check every step and apply none.

    Args:
        steps: the steps, in their order.
        deep: also hash files and run programs.
        listen: called with (step, None) before each step, and with (step, outcome) after it.
    """
    outcomes = []
    for step in steps:
        listen(step, None)
        outcome = _check(step, deep=deep)
        listen(step, outcome)
        outcomes.append(outcome)
    return outcomes


def converge(
    steps: Sequence[Step],
    *,
    listen: Callable[[Step, Outcome | None], None],
    guard: Callable[[], None] = lambda: None,
    stop_at_failure: bool = False,
) -> list[Outcome]:
    """Check each step, apply it if it has drifted, and check it again; stop after an essential step that fails.

    Args:
        steps: the steps, in their order.
        listen: called with (step, None) before each step, and with (step, outcome) after it.
        guard: called before `apply` of each step that is not essential; raises if writing is no longer allowed.
        stop_at_failure: stop after the first step that fails, essential or not. The exit code of that step is FAILED if
            a step has changed something; so BLOCKED means that nothing was changed.

    Raises:
        LostLockError: another run has taken over the run lock. No later step is checked or applied.
    """
    outcomes: list[Outcome] = []
    for number, step in enumerate(steps):
        listen(step, None)
        outcome = _converge(step, guard)
        changed = sum(earlier.changed for earlier in (*outcomes, outcome))
        if stop_at_failure and outcome.error and changed:
            rest = f"{changed} steps are done, {len(steps) - number} are left. Run the same command again to continue."
            outcome = replace(outcome, error=f"{outcome.error} {rest}", exit=Exit.FAILED)
        listen(step, outcome)
        outcomes.append(outcome)
        if outcome.after is not State.OK and (step.essential or stop_at_failure):
            break
    return outcomes


def exit_of(outcomes: Sequence[Outcome]) -> Exit:
    """Return the exit code of a run: that of the first failed step, else CHANGES if a step has drifted, else GOOD."""
    for outcome in outcomes:
        if outcome.exit not in {Exit.GOOD, Exit.CHANGES}:
            return outcome.exit
    return max((outcome.exit for outcome in outcomes), default=Exit.GOOD)


def _check(step: Step, *, deep: bool) -> Outcome:
    started = time.perf_counter()
    try:
        result = step.check(deep=deep)
        if result.state is not State.BLOCKED and isinstance(step, RetryStep) and (reason := step.retry_reason()):
            result = Check(State.DRIFTED, reason)
    except (FirstlightError, OSError) as error:
        return _failed(step, State.BLOCKED, error, started)
    codes = {State.OK: Exit.GOOD, State.DRIFTED: Exit.CHANGES, State.BLOCKED: Exit.BLOCKED}
    return Outcome(
        step.name,
        before=result.state,
        after=result.state,
        changed=False,
        detail=result.detail,
        seconds=time.perf_counter() - started,
        error=result.detail if result.state is State.BLOCKED else None,
        fallback=result.fallback,
        exit=codes[result.state],
    )


def _converge(step: Step, guard: Callable[[], None]) -> Outcome:
    started = time.perf_counter()
    first = _check(step, deep=False)
    if first.before is not State.DRIFTED:
        return first
    try:
        if not step.essential:
            guard()
        step.apply()
        result = step.check()
    except LostLockError:
        raise
    except (FirstlightError, OSError) as error:
        return _failed(step, State.DRIFTED, error, started)
    error_text = None
    code = Exit.GOOD
    if result.state is not State.OK:
        error_text = f"the step is still {result.state.value} after it was applied: {result.detail}"
        code = Exit.BLOCKED if result.state is State.BLOCKED else Exit.FAILED
    return Outcome(
        step.name,
        before=State.DRIFTED,
        after=result.state,
        changed=True,
        detail=result.detail,
        seconds=time.perf_counter() - started,
        error=error_text,
        fallback=result.fallback,
        exit=code,
    )


def _failed(step: Step, before: State, error: FirstlightError | OSError, started: float) -> Outcome:
    failure = error if isinstance(error, FirstlightError) else from_os_error(error)
    return Outcome(
        step.name,
        before=before,
        after=State.BLOCKED if isinstance(failure, BlockedError) else before,
        changed=False,
        detail=str(failure),
        seconds=time.perf_counter() - started,
        error=str(failure),
        exit=failure.exit,
    )
