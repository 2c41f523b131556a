"""--wait SECONDS: a second run waits for the first, says for whom, and then goes on with what the first has left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import BlockedError
from provision.core.layout import Root
from provision.volume.journal import Journal
from provision.volume.journal_acts import FolderCreation
from provision.volume.run_lock import LockWait, holding
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# The first run: it holds the lock until a line comes.
HOLDS = """
import sys
from pathlib import Path
from provision.volume.run_lock import holding
from provision.core.layout import Root
with holding(Root(Path(sys.argv[1])), "make setup"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start(*words: object) -> subprocess.Popen[str]:
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    argv = [sys.executable, "-m", "provision", *map(str, words)]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def first(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A real process that holds the root's lock."""
    argv = [sys.executable, "-c", HOLDS, str(tmp_path / "root")]
    process = subprocess.Popen(argv, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    with contextlib.suppress(BrokenPipeError, ValueError):
        process.communicate("go\n", timeout=600)


def let_go(process: subprocess.Popen[str]) -> None:
    process.communicate("go\n", timeout=600)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


def test_a_run_waits_for_another_and_goes_on(tmp_path: Path, flags: list[object], first: subprocess.Popen[str]) -> None:
    second = start("setup", *flags, "--wait", 600, "--json")
    said = first_line(second)
    assert f"pid {first.pid} on " in said
    assert "at work since" in said
    assert f"holds {tmp_path / 'root/.firstlight/lock'}" in said
    let_go(first)
    stdout, stderr = second.communicate(timeout=600)
    assert second.returncode == 0, stderr
    assert json.loads(stdout)["exit"] == 0


def test_without_it_the_message_names_it(flags: list[object], first: subprocess.Popen[str]) -> None:
    second = start("setup", *flags, "--json")
    stdout, stderr = second.communicate(timeout=600)
    error = json.loads(stdout)["error"]
    assert (second.returncode, error["kind"]) == (4, "locked")
    assert "--wait 600" in error["next"]
    assert "--wait 600" in stderr
    assert f"pid {first.pid}" in stderr


def test_an_interrupt_ends_the_wait(tmp_path: Path, flags: list[object], first: subprocess.Popen[str]) -> None:
    second = start("setup", *flags, "--wait", 600)
    first_line(second)
    second.send_signal(signal.SIGINT)
    _, stderr = second.communicate(timeout=600)
    assert second.returncode == 130
    assert "Traceback" not in stderr
    assert not (tmp_path / "root/envs").exists()


def test_every_command_that_takes_the_lock_can_wait(
    tmp_path: Path, flags: list[object], first: subprocess.Popen[str]
) -> None:
    for command in ("setup", "repair", "undo", "gc", "relocate", "env create", "env remove", "mirrors use"):
        argv = [sys.executable, "-m", "provision", *command.split(), "--help"]
        done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        assert "--wait" in done.stdout, command
    let_go(first)


def test_what_the_first_run_has_changed_is_looked_at_anew(tmp_path: Path, flags: list[object]) -> None:
    """`undo --wait` takes back the newest run there is then, not the one there was when it began to wait."""
    made = start("setup", *flags)
    _, stderr = made.communicate(timeout=600)
    assert made.returncode == 0, stderr
    root = tmp_path / "root"
    argv = [sys.executable, "-c", HOLDS, str(root)]
    first = subprocess.Popen(argv, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    first.stdout.readline()
    mine = tmp_path / "home/mine"
    mine.mkdir()
    earlier = Journal(root / ".firstlight/journal", "setup")
    earlier.record(FolderCreation(mine))
    second = start("undo", *flags[:2], *flags[4:], "--wait", 600)
    first_line(second)
    newer = tmp_path / "home/newer"
    newer.mkdir()
    later = Journal(root / ".firstlight/journal", "setup")
    later.record(FolderCreation(newer))
    assert later.path is not None
    later.path.rename(later.path.with_name("99990101T000000Z-1.jsonl"))  # runs are ordered by their names
    let_go(first)
    stdout, stderr = second.communicate(timeout=600)
    assert second.returncode == 0, stdout + stderr
    assert (mine.exists(), newer.exists()) == (True, False)


@dataclass
class Clock:
    """Seconds that pass only while a wait pauses; `at` is what happens then."""

    now: float = 0.0
    at: dict[int, Callable[[], None]] = field(default_factory=dict)

    def pause(self, seconds: float) -> None:
        before, self.now = self.now, round(self.now + seconds, 3)
        for second, act in self.at.items():
            if before < second <= self.now:
                act()


def test_a_line_comes_each_ten_seconds_and_the_wait_has_an_end(tmp_path: Path, first: subprocess.Popen[str]) -> None:
    clock, said = Clock(), list[str]()
    patience = LockWait(35, said.append, lambda: clock.now, clock.pause)
    with (
        pytest.raises(BlockedError, match=r"still holds .* after 35 s") as refused,
        holding(Root(tmp_path / "root"), "make setup", patience),
    ):
        pytest.fail("the lock is another run's")
    assert refused.value.kind == "locked"
    assert [line.split(":")[0] for line in said] == [
        "waiting for the lock, up to 35 s more",
        "waiting for the lock, up to 25 s more",
        "waiting for the lock, up to 15 s more",
        "waiting for the lock, up to 5 s more",
    ]
    let_go(first)


def test_the_lock_is_taken_when_it_comes_free(tmp_path: Path, first: subprocess.Popen[str]) -> None:
    clock = Clock()
    clock.at[12] = lambda: let_go(first)
    patience = LockWait(35, lambda _: None, lambda: clock.now, clock.pause)
    with holding(Root(tmp_path / "root"), "make setup", patience) as has_waited:
        assert has_waited
        assert 12 <= clock.now < 13
    with holding(Root(tmp_path / "root"), "make setup") as has_waited:
        assert not has_waited
