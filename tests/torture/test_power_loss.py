"""Tests that a power loss at any moment loses no content of the user, and that the next command succeeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.torture import all_scenarios, crash
from tests.torture.all_scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.torture.all_scenarios import Recorded
    from tests.torture.crash import Crash

_SEEDS = 24  # the random choices of lost steps for each step count and model
_QUICK = 12  # the disks of each scenario


def some(work: Recorded, count: int) -> list[Crash]:
    """Return about `count` disks, spread evenly from the first step to the last."""
    between = max(1, len(work.recording.steps) // (count // 2))
    disks = list(crash.states(work.recording, seeds=0, only=lambda step: step % between == between // 2))
    return disks[:: max(1, len(disks) // count)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_next_command_succeeds_after_a_dozen_power_losses(record: Callable[[str], Recorded], name: str) -> None:
    work = record(name)
    disks = some(work, _QUICK)
    assert len(disks) >= min(_QUICK, len(work.recording.steps)) // 2
    all_scenarios.is_safe(all_scenarios.examine(work, disks))


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_next_command_succeeds_after_every_power_loss(record: Callable[[str], Recorded], name: str) -> None:
    work = record(name)
    report = all_scenarios.everything(work, _SEEDS)
    print(
        f"{name}: {len(work.recording.steps)} steps, {report.states} states, {report.ways} commands run, "
        f"{len(report.losses)} losses, {len(report.stuck)} failed"
    )
    all_scenarios.is_safe(report)
