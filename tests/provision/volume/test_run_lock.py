"""Tests the run lock with real processes, and the flag --wait, with which a second run waits for the first run."""

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

from provision.core import step
from provision.core.errors import BlockedError, LostLockError
from provision.core.layout import Root
from provision.fs.lease import Holder
from provision.fs.process_identity import ProcessIdentity
from provision.volume import run_lock
from provision.volume.journal import Journal
from provision.volume.journal_acts import FolderCreation
from provision.volume.run_lock import LockWait, holding
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# The program of the first run, which holds the lock until it reads a line from stdin.
LOCK_HOLDER = """
import sys
from pathlib import Path
from provision.volume.run_lock import holding
from provision.core.layout import Root
with holding(Root(Path(sys.argv[1])), "make setup"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start `provision` with these arguments in a child process, and return the process."""
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    argv = [sys.executable, "-m", "provision", *map(str, arguments)]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def first(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a real process that holds the root's lock."""
    argv = [sys.executable, "-c", LOCK_HOLDER, str(tmp_path / "root")]
    process = subprocess.Popen(argv, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    with contextlib.suppress(BrokenPipeError, ValueError):
        process.communicate("go\n", timeout=600)


def release_lock(process: subprocess.Popen[str]) -> None:
    """Let the first run release its lock and end."""
    process.communicate("go\n", timeout=600)


def first_stderr_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


def test_setup_with_wait_reports_the_run_that_holds_the_lock_and_starts_after_its_end(
    tmp_path: Path, flags: list[object], first: subprocess.Popen[str]
) -> None:
    second = start("setup", *flags, "--wait", 600, "--json")
    line = first_stderr_line(second)
    assert f"pid {first.pid} on " in line
    assert "at work since" in line
    assert f"holds {tmp_path / 'root/.firstlight/lock'}" in line
    release_lock(first)
    stdout, stderr = second.communicate(timeout=600)
    assert second.returncode == 0, stderr
    assert json.loads(stdout)["exit"] == 0


def test_setup_without_wait_fails_while_another_run_holds_the_lock_and_suggests_wait(
    flags: list[object], first: subprocess.Popen[str]
) -> None:
    second = start("setup", *flags, "--json")
    stdout, stderr = second.communicate(timeout=600)
    error = json.loads(stdout)["error"]
    assert (second.returncode, error["kind"]) == (4, "locked")
    assert "--wait 600" in error["next"]
    assert "--wait 600" in stderr
    assert f"pid {first.pid}" in stderr


def test_interrupt_ends_the_wait_for_the_lock_with_exit_code_130(
    tmp_path: Path, flags: list[object], first: subprocess.Popen[str]
) -> None:
    second = start("setup", *flags, "--wait", 600)
    first_stderr_line(second)
    second.send_signal(signal.SIGINT)
    _, stderr = second.communicate(timeout=600)
    assert second.returncode == 130
    assert "Traceback" not in stderr
    assert not (tmp_path / "root/envs").exists()


def test_every_command_that_takes_the_lock_has_the_flag_wait(
    tmp_path: Path, flags: list[object], first: subprocess.Popen[str]
) -> None:
    for command in ("setup", "repair", "undo", "gc", "relocate", "env create", "env remove", "mirrors use"):
        argv = [sys.executable, "-m", "provision", *command.split(), "--help"]
        done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        assert "--wait" in done.stdout, command
    release_lock(first)


def test_undo_with_wait_undoes_the_run_that_is_newest_after_the_wait(tmp_path: Path, flags: list[object]) -> None:
    setup = start("setup", *flags)
    _, stderr = setup.communicate(timeout=600)
    assert setup.returncode == 0, stderr
    root = tmp_path / "root"
    argv = [sys.executable, "-c", LOCK_HOLDER, str(root)]
    first = subprocess.Popen(argv, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    first.stdout.readline()
    mine = tmp_path / "home/mine"
    mine.mkdir()
    earlier = Journal(root / ".firstlight/journal", "setup")
    earlier.record(FolderCreation(mine))
    second = start("undo", *flags[:2], *flags[4:], "--wait", 600)
    first_stderr_line(second)
    newer = tmp_path / "home/newer"
    newer.mkdir()
    later = Journal(root / ".firstlight/journal", "setup")
    later.record(FolderCreation(newer))
    assert later.path is not None
    later.path.rename(later.path.with_name("99990101T000000Z-1.jsonl"))  # runs are ordered by their names
    release_lock(first)
    stdout, stderr = second.communicate(timeout=600)
    assert second.returncode == 0, stdout + stderr
    assert (mine.exists(), newer.exists()) == (True, False)


@dataclass
class Clock:
    """Counts seconds, which pass only in `pause`; `events` is {second: function to call at that time}."""

    now: float = 0.0
    events: dict[int, Callable[[], None]] = field(default_factory=dict)

    def pause(self, seconds: float) -> None:
        before, self.now = self.now, round(self.now + seconds, 3)
        for second, event in self.events.items():
            if before < second <= self.now:
                event()


def test_wait_for_the_lock_is_reported_every_ten_seconds_and_ends_after_its_limit(
    tmp_path: Path, first: subprocess.Popen[str]
) -> None:
    clock, reports = Clock(), list[str]()
    waiting = LockWait(35, reports.append, lambda: clock.now, clock.pause)
    with (
        pytest.raises(BlockedError, match=r"still holds .* after 35 s") as error,
        holding(Root(tmp_path / "root"), "make setup", waiting),
    ):
        pytest.fail("another run holds the lock")
    assert error.value.kind == "locked"
    assert [line.split(":")[0] for line in reports] == [
        "waiting for the lock, up to 35 s more",
        "waiting for the lock, up to 25 s more",
        "waiting for the lock, up to 15 s more",
        "waiting for the lock, up to 5 s more",
    ]
    release_lock(first)


def test_waiting_run_takes_the_lock_within_a_second_after_the_first_run_releases_it(
    tmp_path: Path, first: subprocess.Popen[str]
) -> None:
    clock = Clock()
    clock.events[12] = lambda: release_lock(first)
    waiting = LockWait(35, lambda _: None, lambda: clock.now, clock.pause)
    with holding(Root(tmp_path / "root"), "make setup", waiting) as has_waited:
        assert has_waited
        assert 12 <= clock.now < 13
    with holding(Root(tmp_path / "root"), "make setup") as has_waited:
        assert not has_waited


FAR = Holder(ProcessIdentity("far", 7, "another boot", "4026531836", "", "5"), "a token", "2026-01-01 00:00:00Z")


@pytest.fixture
def far_claim(tmp_path: Path) -> Path:
    """Write the claim of a run on another host that does not renew it, and return the path of the claim."""
    root = Root(tmp_path / "root")
    root.state.mkdir(parents=True)
    claim = root.state / "lock.lease-1"
    claim.write_bytes(FAR.to_bytes(0))
    return claim


def test_lock_of_a_killed_run_of_another_host_is_taken_over_and_reported(tmp_path: Path, far_claim: Path) -> None:
    clock, reports = Clock(), list[str]()
    waiting = LockWait(0, reports.append, lambda: clock.now, clock.pause)
    with holding(Root(tmp_path / "root"), "make setup", waiting) as has_waited:
        assert has_waited
        assert 120 <= clock.now < 121
        assert not far_claim.exists()
    assert reports[0] == (
        "waiting for a sign of life of the run that has the lock, up to 120 s more: "
        f"pid 7 on far, at work since 2026-01-01 00:00:00Z, holds {tmp_path / 'root/.firstlight/lock'}"
    )
    assert reports[-1] == (
        f"took over {tmp_path / 'root/.firstlight/lock'}: pid 7 on far, at work since 2026-01-01 00:00:00Z, "
        "has not renewed it for 120 s, so it has expired"
    )


def test_run_without_wait_is_blocked_when_the_run_on_the_other_host_renews_its_claim(
    tmp_path: Path, far_claim: Path
) -> None:
    clock = Clock()

    def renew() -> None:
        far_claim.write_bytes(FAR.to_bytes(1))

    clock.events[7] = renew
    waiting = LockWait(0, lambda _: None, lambda: clock.now, clock.pause)
    with (
        pytest.raises(BlockedError, match=r"pid 7 on far, at work since .* holds .* Wait until that run ends"),
        holding(Root(tmp_path / "root"), "make setup", waiting),
    ):
        pytest.fail("another run holds the lock")
    assert 7 <= clock.now < 8


def test_lock_file_of_an_older_version_without_flock_expires_after_120_seconds(tmp_path: Path) -> None:
    root, clock, reports = Root(tmp_path / "root"), Clock(), list[str]()
    root.state.mkdir(parents=True)
    root.lock.write_text("1\nfar\n1\n")
    root.holder.write_text('{"pid": 1, "host": "far", "started": "then"}')
    waiting = LockWait(0, reports.append, lambda: clock.now, clock.pause)
    with holding(root, "make setup", waiting):
        assert clock.now >= 120
        assert not root.holder.exists()
    assert "pid 1 on far, at work since then, holds" in reports[0]
    assert "pid 1 on far" in reports[-1]
    assert not root.lock.exists() or not root.lock.read_bytes()


def test_run_that_lost_the_lock_records_no_act_and_applies_no_step(tmp_path: Path) -> None:
    root, applied = Root(tmp_path / "root"), list[str]()
    journal = Journal(root.journal, "setup")

    class StepThatLosesTheLock:
        local, essential = True, False

        def __init__(self, name: str) -> None:
            self.name = name

        def describe(self) -> str:
            return self.name

        def check(self, *, deep: bool = False) -> step.Check:
            return step.Check(step.State.DRIFTED, "")

        def apply(self) -> None:
            applied.append(self.name)
            journal.record(FolderCreation(tmp_path / "a"))
            (root.state / "lock.lease-1").unlink()
            (root.state / "lock.lease-2").write_bytes(FAR.to_bytes(0))
            journal.record(FolderCreation(tmp_path / "b"))
            pytest.fail("the act was recorded")

    with (
        pytest.raises(LostLockError, match="pid 7 on far") as error,
        holding(root, "make setup"),
    ):
        step.converge([StepThatLosesTheLock("1"), StepThatLosesTheLock("2")], listen=lambda *_: None)
    assert error.value.exit == 4
    assert applied == ["1"]
    assert journal.path is not None
    assert "/b" not in journal.path.read_text()
    assert (root.state / "lock.lease-2").read_bytes() == FAR.to_bytes(0)
    run_lock.require(root.state)  # this process holds no lock any more, so no error is raised


def relocate(tmp_path: Path) -> subprocess.Popen[str]:
    """Start `provision relocate`, which needs the lock and no other program."""
    (tmp_path / "home/data").mkdir(exist_ok=True)
    return start("relocate", tmp_path / "home/data", "--root", tmp_path / "root", "--json")


def test_relocate_works_on_a_volume_without_flock(tmp_path: Path, no_flock: None) -> None:
    (tmp_path / "root/.firstlight").mkdir(parents=True)
    (tmp_path / "root/.firstlight/lock").touch()  # as a host with flock leaves the file
    run = relocate(tmp_path)
    stdout, stderr = run.communicate(timeout=600)
    assert run.returncode == 0, stdout + stderr
    assert "took over" not in stderr
    assert not list((tmp_path / "root/.firstlight").glob("lock.lease-*"))


def test_second_run_is_blocked_on_a_volume_without_flock_until_the_first_has_ended(
    tmp_path: Path, no_flock: None
) -> None:
    argv = [sys.executable, "-c", LOCK_HOLDER, str(tmp_path / "root")]
    first = subprocess.Popen(argv, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    first.stdout.readline()
    stdout, _ = relocate(tmp_path).communicate(timeout=600)
    assert json.loads(stdout)["error"]["kind"] == "locked"
    first.kill()
    first.communicate()
    third = relocate(tmp_path)
    stdout, stderr = third.communicate(timeout=600)
    assert third.returncode == 0, stdout + stderr
    assert f"pid {first.pid} on " in stderr
