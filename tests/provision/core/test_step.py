"""The engine: look, decide, act, look again."""

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
class Thing:
    """A step whose world is a variable."""

    name: str = "thing"
    essential: bool = False
    local: bool = True
    state: State = State.DRIFTED
    does: Callable[[Thing], None] = lambda self: setattr(self, "state", State.OK)
    acts: list[str] = field(default_factory=list)

    def describe(self) -> str:
        return "do it"

    def check(self, *, deep: bool = False) -> Check:
        self.acts.append("deep" if deep else "check")
        return Check(self.state, "as it is")

    def apply(self) -> None:
        self.acts.append("apply")
        self.does(self)


def unheard(_: Step, __: Outcome | None) -> None: ...


def test_it_looks_acts_and_looks_again() -> None:
    thing = Thing()
    (outcome,) = step.converge([thing], listen=unheard)
    assert thing.acts == ["check", "apply", "check"]
    assert (outcome.before, outcome.after, outcome.changed) == (State.DRIFTED, State.OK, True)


def test_what_stands_is_not_touched() -> None:
    thing = Thing(state=State.OK)
    (outcome,) = step.converge([thing], listen=unheard)
    assert thing.acts == ["check"]
    assert not outcome.changed


def test_a_step_that_stays_drifted_is_an_error() -> None:
    outcomes = step.converge([Thing(does=lambda _: None)], listen=unheard)
    assert "still drifted" in (outcomes[0].error or "")
    assert step.exit_of(outcomes) is Exit.FAILED


def test_a_blocked_step_is_not_applied_and_the_others_go_on() -> None:
    blocked, other = Thing(state=State.BLOCKED), Thing("other")
    outcomes = step.converge([blocked, other], listen=unheard)
    assert blocked.acts == ["check"]
    assert other.state is State.OK
    assert step.exit_of(outcomes) is Exit.BLOCKED


def test_after_an_essential_failure_nothing_is_touched() -> None:
    other = Thing("other")
    step.converge([Thing(essential=True, state=State.BLOCKED), other], listen=unheard)
    assert other.acts == []


def fail_with(error: BaseException) -> Callable[[Thing], None]:
    def does(_: Thing) -> None:
        raise error

    return does


@pytest.mark.parametrize(
    ("error", "code", "told"),
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
def test_a_known_failure_becomes_an_outcome(error: BaseException, code: Exit, told: str) -> None:
    outcomes = step.converge([Thing(does=fail_with(error))], listen=unheard)
    assert told in (outcomes[0].error or "")
    assert outcomes[0].exit is step.exit_of(outcomes) is code


def test_an_unknown_failure_and_an_interrupt_are_not_swallowed() -> None:
    for error in (ZeroDivisionError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            step.converge([Thing(does=fail_with(error))], listen=unheard)


def test_a_look_changes_nothing_and_drift_is_its_exit_code() -> None:
    thing = Thing()
    outcomes = step.look([thing, Thing(state=State.OK)], deep=True, listen=unheard)
    assert thing.acts == ["deep"]
    assert step.exit_of(outcomes) is Exit.CHANGES
    assert step.exit_of(step.look([thing, Thing(state=State.BLOCKED)], listen=unheard)) is Exit.BLOCKED
    assert step.exit_of([]) is Exit.GOOD


def test_nothing_is_applied_once_the_guard_refuses() -> None:
    """The volume may be unmounted while a run is at work; only the essential step, which makes the marker, is free."""

    def gone() -> None:
        raise BlockedError("the volume is gone")

    first, second = Thing("first", essential=True), Thing("second")
    outcomes = step.converge([first, second], listen=lambda _, __: None, guard=gone)
    assert [(outcome.after, outcome.exit) for outcome in outcomes] == [
        (State.OK, Exit.GOOD),
        (State.BLOCKED, Exit.BLOCKED),
    ]
    assert second.acts == ["check"]
