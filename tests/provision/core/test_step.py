"""Tests how lists of steps are checked, applied and checked again."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from provision.core import step
from provision.core.errors import BlockedError, Exit, FirstlightError
from provision.core.step import Check, Outcome, State, Step

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class FakeStep:
    """Implements a step whose state is a field; `acts` records the calls, and `apply` calls `does`."""

    name: str = "thing"
    essential: bool = False
    local: bool = True
    state: State = State.DRIFTED
    does: Callable[[FakeStep], None] = lambda self: setattr(self, "state", State.OK)
    acts: list[str] = field(default_factory=list)

    def describe(self) -> str:
        return "do it"

    def check(self, *, deep: bool = False) -> Check:
        self.acts.append("deep" if deep else "check")
        return Check(self.state, "as it is")

    def apply(self) -> None:
        self.acts.append("apply")
        self.does(self)


def ignore(_: Step, __: Outcome | None) -> None: ...


def test_drifted_step_is_checked_applied_and_checked_again() -> None:
    fake = FakeStep()
    (outcome,) = step.converge([fake], listen=ignore)
    assert fake.acts == ["check", "apply", "check"]
    assert (outcome.before, outcome.after, outcome.changed) == (State.DRIFTED, State.OK, True)


def test_step_that_is_ok_is_not_applied() -> None:
    fake = FakeStep(state=State.OK)
    (outcome,) = step.converge([fake], listen=ignore)
    assert fake.acts == ["check"]
    assert not outcome.changed


def test_step_that_is_still_drifted_after_apply_is_an_error() -> None:
    outcomes = step.converge([FakeStep(does=lambda _: None)], listen=ignore)
    assert "still drifted" in (outcomes[0].error or "")
    assert step.exit_of(outcomes) is Exit.FAILED


@dataclass
class RetriedStep(FakeStep):
    """A step with a reason to retry, which is applied even if its check finds the state ok."""

    def retry_reason(self) -> str | None:
        self.acts.append("retry")
        return "once more"


@pytest.mark.parametrize("state", [State.OK, State.DRIFTED])
def test_step_with_a_reason_to_retry_is_applied_once_even_if_its_state_is_ok(state: State) -> None:
    retried = RetriedStep(state=state)
    (outcome,) = step.converge([retried], listen=ignore)
    assert retried.acts == ["check", "retry", "apply", "check"]
    assert (outcome.before, outcome.after, outcome.changed, outcome.error) == (State.DRIFTED, State.OK, True, None)


def test_blocked_step_with_a_reason_to_retry_stays_blocked() -> None:
    retried = RetriedStep(state=State.BLOCKED)
    (outcome,) = step.check_all([retried], listen=ignore)
    assert retried.acts == ["check"]
    assert outcome.after is State.BLOCKED


def test_check_all_reports_a_step_with_a_reason_to_retry_as_drifted() -> None:
    (outcome,) = step.check_all([RetriedStep(state=State.OK)], listen=ignore)
    assert (outcome.after, outcome.detail, outcome.exit) == (State.DRIFTED, "once more", Exit.CHANGES)


def test_blocked_step_is_not_applied_and_other_steps_continue() -> None:
    blocked, other = FakeStep(state=State.BLOCKED), FakeStep("other")
    outcomes = step.converge([blocked, other], listen=ignore)
    assert blocked.acts == ["check"]
    assert other.state is State.OK
    assert step.exit_of(outcomes) is Exit.BLOCKED


def test_no_step_runs_after_a_blocked_essential_step() -> None:
    other = FakeStep("other")
    step.converge([FakeStep(essential=True, state=State.BLOCKED), other], listen=ignore)
    assert other.acts == []


def fail_with(error: BaseException) -> Callable[[FakeStep], None]:
    def does(_: FakeStep) -> None:
        raise error

    return does


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FirstlightError("no such luck"), Exit.FAILED, "no such luck"),
        (BlockedError("mount it"), Exit.BLOCKED, "mount it"),
        (OSError(errno.ENOSPC, "x", "/data/f"), Exit.BLOCKED, "/data/f: no space left"),
        (OSError(errno.EDQUOT, "x", "/data/f"), Exit.BLOCKED, "/data/f: no space left"),
        (OSError(errno.EROFS, "x", "/data/f"), Exit.BLOCKED, "read-only"),
        (OSError(errno.EACCES, "x", "/data/f"), Exit.BLOCKED, "permission denied"),
        (OSError(errno.EIO, "Input/output error", "/data/f"), Exit.FAILED, "/data/f: Input/output error"),
    ],
)
def test_expected_error_of_a_step_becomes_an_outcome_with_its_message_and_exit_code(
    error: BaseException, code: Exit, text: str
) -> None:
    outcomes = step.converge([FakeStep(does=fail_with(error))], listen=ignore)
    assert text in (outcomes[0].error or "")
    assert outcomes[0].exit is step.exit_of(outcomes) is code


def test_unexpected_error_or_interrupt_of_a_step_is_raised_to_the_caller() -> None:
    for error in (ZeroDivisionError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            step.converge([FakeStep(does=fail_with(error))], listen=ignore)


def test_check_all_applies_no_step_and_its_exit_code_reports_drifted_steps() -> None:
    fake = FakeStep()
    outcomes = step.check_all([fake, FakeStep(state=State.OK)], deep=True, listen=ignore)
    assert fake.acts == ["deep"]
    assert step.exit_of(outcomes) is Exit.CHANGES
    assert step.exit_of(step.check_all([fake, FakeStep(state=State.BLOCKED)], listen=ignore)) is Exit.BLOCKED
    assert step.exit_of([]) is Exit.GOOD


def test_only_essential_steps_are_applied_if_the_check_before_each_step_raises() -> None:
    """Let the guard, which runs before each step, raise an error, as it does when the volume is unmounted.

    An essential step runs without the guard, because it makes the marker that the guard needs.
    """

    def refuse() -> None:
        raise BlockedError("the volume is gone")

    first, second = FakeStep("first", essential=True), FakeStep("second")
    outcomes = step.converge([first, second], listen=lambda _, __: None, guard=refuse)
    assert [(outcome.after, outcome.exit) for outcome in outcomes] == [
        (State.OK, Exit.GOOD),
        (State.BLOCKED, Exit.BLOCKED),
    ]
    assert second.acts == ["check"]


def test_run_with_stop_at_failure_skips_later_steps_and_its_error_counts_the_finished_ones() -> None:
    def fail(_: FakeStep) -> None:
        raise BlockedError("in use.")

    def run(*steps: FakeStep) -> list[Outcome]:
        return step.converge(steps, listen=ignore, stop_at_failure=True)

    last = FakeStep()
    first, failed = run(FakeStep(), FakeStep(does=fail), last)
    assert last.acts == []
    assert (first.changed, failed.exit) == (True, Exit.FAILED)
    assert failed.error == "in use. 1 steps are done, 2 are left. Run the same command again to continue."
    (unchanged,) = run(FakeStep(does=fail), last)
    assert (unchanged.exit, unchanged.error) == (Exit.BLOCKED, "in use.")
