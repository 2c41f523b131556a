"""Lists the scenarios, records their commands, and examines the disks that a power loss may leave."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.torture import crash, disk, write_log
from tests.torture.config_scenarios import CONFIG
from tests.torture.pull_scenario import PULL
from tests.torture.scenarios import FOLDERS, Field, Patched, Reading, Scenario

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.torture.crash import Crash
    from tests.torture.write_log import Recording

SCENARIOS: dict[str, Scenario] = FOLDERS | CONFIG | PULL


@dataclass(frozen=True)
class Recorded:
    """Hold the recording of a scenario's command, and the readings of the folders before and after the command."""

    name: str
    field: Field
    recording: Recording
    before: Reading
    after: Reading

    @property
    def scenario(self) -> Scenario:
        return SCENARIOS[self.name]


@dataclass
class Report:
    """Count what `examine` has done.

    Attributes:
        states: the examined disks.
        ways: the follow-up commands that were run.
        losses: a text for each disk on which a content of the user is lost.
        stuck: a text for each follow-up command that failed.
        reasons: {start of the error of a follow-up command: how often}.
    """

    states: int = 0
    ways: int = 0
    losses: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


def recorded(name: str, library: Path, base: Path) -> Recorded:
    """Build the folders of a scenario below `base`, run its command under the recorder `library`, and return both."""
    scenario, place = SCENARIOS[name], Field(base)
    for top in (place.home, place.volume):
        disk.clear(top)
    with Patched(scenario, place):
        scenario.lay(place)
        before = place.read()
        tops = {place.home: 0, place.volume: int(scenario.two_disks)}
        argv = [sys.executable, "-I", "-B", str(Path(__file__).with_name("act.py")), name, str(base)]
        recording = write_log.record(library, argv, tops, base / "log")
        return Recorded(name, place, recording, before, place.read())


def examine(work: Recorded, disks: Iterable[Crash]) -> Report:
    """Look for lost content on each disk; then write the disk to real folders, and run each follow-up command on it."""
    report = Report()
    scenario, place = work.scenario, work.field
    places = tuple(str(path) for path in scenario.kept(place))
    before = disk.contents(work.recording.before)
    files = {path: content for path, content in before.items() if path in work.before}
    owned = files if scenario.owned is None else {content.decode(): content for content in scenario.owned}
    with Patched(scenario, place):
        for state in disks:
            report.states += 1
            contents = {content for path, content in disk.contents(state.disk).items() if _is_below(path, places)}
            lost = sorted(path for path, content in owned.items() if content not in contents)
            if lost:
                report.losses.append(f"{work.name}: {state.name}: lost {', '.join(lost)}")
            for way, end in scenario.ends.items():
                state.disk.write()
                report.ways += 1
                try:
                    end(place, work.before, work.after)
                except Exception as error:
                    report.stuck.append(f"{work.name}: {state.name}: {way}: {type(error).__name__}: {error}")
                    report.reasons[f"{way}: {type(error).__name__}: {str(error)[:150]}"] += 1
    return report


def assert_safe(report: Report) -> None:
    """Assert that no content was lost and that every follow-up command succeeded."""
    assert not report.losses, "\n".join(report.losses[:5])
    assert not report.stuck, "\n".join(report.stuck[:5])


def examine_all(work: Recorded, seeds: int) -> Report:
    """Examine every disk that the two file system models allow, with `seeds` random choices of lost steps each."""
    return examine(work, crash.states(work.recording, seeds=seeds))


def _is_below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)
