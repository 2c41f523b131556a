"""After a power loss at any moment nothing of the user's is lost, and the next command gets to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.torture import all_scenarios, crash
from tests.torture.all_scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.torture.all_scenarios import Recorded
    from tests.torture.crash import Crash

_SEEDS = 24  # the random ways for each step and model
_QUICK = 12  # disks of a scenario


def some(work: Recorded, count: int) -> list[Crash]:
    """Return so many disks, from the first step to the last; twice as many for a scenario of few steps is no harm."""
    between = max(1, len(work.recording.steps) // (count // 2))
    disks = list(crash.states(work.recording, seeds=0, only=lambda step: step % between == between // 2))
    return disks[:: max(1, len(disks) // count)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_command_goes_on_from_a_dozen_states_of_each_scenario(record: Callable[[str], Recorded], name: str) -> None:
    work = record(name)
    disks = some(work, _QUICK)
    assert len(disks) >= min(_QUICK, len(work.recording.steps)) // 2
    all_scenarios.is_safe(all_scenarios.examine(work, disks))


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_command_goes_on_from_every_state(record: Callable[[str], Recorded], name: str) -> None:
    work = record(name)
    report = all_scenarios.everything(work, _SEEDS)
    print(
        f"{name}: {len(work.recording.steps)} steps, {report.states} states, {report.ways} ways to go on, "
        f"{len(report.losses)} losses, {len(report.stuck)} without an end"
    )
    all_scenarios.is_safe(report)
