"""Tests that a power loss at any moment loses no content of the user, and that follow-up commands succeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.torture import all_scenarios, crash
from tests.torture.all_scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.torture.all_scenarios import Recorded
    from tests.torture.crash import Crash

_SEEDS = 24  # the number of random choices of lost steps, for each step count and model
_QUICK = 12  # the number of disks that the usual run examines in each scenario


def some(work: Recorded, count: int) -> list[Crash]:
    """Return about `count` of the disks that a power loss may leave, spread evenly from the first step to the last."""
    between = max(1, len(work.recording.steps) // (count // 2))
    disks = list(crash.states(work.recording, seeds=0, only=lambda step: step % between == between // 2))
    return disks[:: max(1, len(disks) // count)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_content_is_lost_and_follow_up_commands_succeed_after_power_losses_at_twelve_moments(
    record: Callable[[str], Recorded], name: str
) -> None:
    work = record(name)
    disks = some(work, _QUICK)
    assert len(disks) >= min(_QUICK, len(work.recording.steps)) // 2
    all_scenarios.assert_safe(all_scenarios.examine(work, disks))


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_content_is_lost_and_follow_up_commands_succeed_after_a_power_loss_at_any_moment(
    record: Callable[[str], Recorded], name: str
) -> None:
    work = record(name)
    report = all_scenarios.examine_all(work, _SEEDS)
    print(
        f"{name}: {len(work.recording.steps)} steps, {report.states} disks, {report.ways} follow-up commands, "
        f"{len(report.losses)} disks with a loss, {len(report.stuck)} commands failed"
    )
    all_scenarios.assert_safe(report)
