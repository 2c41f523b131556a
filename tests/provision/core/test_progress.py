"""Tests that long work shows its counts, its rate and the time left; the tests control the clock and the pauses."""

from __future__ import annotations

import json
import os
import pty
import queue
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from provision.cli.common import resolve_host
from provision.cli.models_output import DownloadBars
from provision.cli.output import Screen
from provision.core import hashing
from provision.core.progress import ChildWrites, Meter, Ticker, format_bytes, format_duration
from provision.core.step import Check, State
from provision.relocation.move import FolderMove
from provision.relocation.move_pair import MovePair
from provision.setup import plan
from provision.volume.journal import Journal
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Clock:
    """Provides a clock and a pause for a thread; time passes only when the test calls `run`."""

    def __init__(self) -> None:
        self.now = 0.0
        self._go: queue.Queue[bool] = queue.Queue()
        self._paused: queue.Queue[None] = queue.Queue()

    def pause(self, seconds: float) -> bool:
        """Block the thread until the test calls `run` or `end`; return True if the thread must end."""
        self._paused.put(None)
        return self._go.get()

    def run(self, seconds: int, act: Callable[[], None] = lambda: None) -> None:
        """Let the given seconds pass; in each second call `act`, then let the thread take one sample."""
        for _ in range(seconds):
            self._paused.get(timeout=600)
            self.now += 1
            act()
            self._go.put(False)

    def end(self) -> None:
        """Let the next pause of the thread return True, which ends the thread."""
        self._go.put(True)


class Work:
    """Implements a step that does no work."""

    essential = local = False

    def __init__(self, name: str) -> None:
        self.name = name

    def describe(self) -> str:
        return "nothing"

    def check(self, *, deep: bool = False) -> Check:
        return Check(State.OK, "fine")

    def apply(self) -> None: ...


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (812_000_000, "812 MB"),
        (2_900_000_000, "2.9 GB"),
        (9.96e9, "10 GB"),
    ],
)
def test_bytes_are_formatted_with_a_decimal_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (150, "2 min 30 s"), (180, "3 min"), (3900, "1 h 5 min"), (7200, "2 h")],
)
def test_durations_are_formatted_with_at_most_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_download_shows_bytes_rate_and_time_left() -> None:
    meter = Meter("environment diffusers", 0.0)
    meter.sample(0.0)
    for second in range(1, 59):
        meter.add(14_000_000, 2_900_000_000)
        meter.sample(float(second))
    assert meter.text(58.0) == "812 MB of 2.9 GB, 14 MB/s, about 2 min 29 s left"
    assert meter.share() == pytest.approx(0.28)


def test_shown_rate_is_the_mean_of_the_last_30_seconds() -> None:
    meter = Meter("model m", 0.0)
    meter.add(1_000_000_000, 4_000_000_000)  # the first second is faster than the others
    meter.sample(1.0)
    for second in range(2, 100):
        meter.add(1_000_000)
        meter.sample(float(second))
    assert "1.0 MB/s" in meter.text(99.0)


def test_time_left_is_estimated_from_the_file_count_if_no_bytes_are_reported() -> None:
    meter = Meter("relocate conda", 0.0)
    meter.add(5_000, 20_000, "files")
    meter.sample(10.0)
    assert meter.text(10.0) == "5,000 of 20,000 files, about 30 s left"
    assert meter.share() == 0.25


def test_step_that_reports_no_progress_shows_its_elapsed_seconds() -> None:
    meter = Meter("smoke", 5.0)
    meter.sample(17.0)
    assert meter.text(17.0) == "12 s so far"


def test_total_that_is_smaller_than_the_reported_count_is_not_shown() -> None:
    meter = Meter("x", 0.0)
    meter.add(300_000_000, 200_000_000)
    meter.sample(10.0)
    assert meter.text(10.0) == "300 MB, 30 MB/s, 10 s so far"


def test_hashed_bytes_are_shown_with_the_time_left_and_without_a_rate() -> None:
    meter = Meter("model m", 0.0)
    meter.add(1_200_000_000, 2_600_000_000, "bytes hashed")
    meter.sample(12.0)
    assert meter.text(12.0) == "1.2 GB of 2.6 GB hashed, about 14 s left"


def test_bytes_that_child_processes_write_are_counted_and_shown(tmp_path: Path) -> None:
    """Let a real child process write five megabytes; they still count after the process has ended."""
    code = "import sys; open(sys.argv[1], 'wb').write(b'x' * 5_000_000); print('written', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    written = ChildWrites()
    if not hasattr(__import__("psutil").Process(), "io_counters"):
        pytest.skip("this system does not count the bytes of a process")
    count = written()
    assert count >= 5_000_000
    child.communicate(b"")
    assert written() >= 5_000_000
    meter = Meter("environment e", 0.0, lambda: count)
    meter.sample(10.0)
    assert "5.0 MB written, 500 kB/s, 10 s so far" in meter.text(10.0)
    meter.add(0, 50_000_000)
    assert "5.0 MB of 50 MB written, 500 kB/s, about 1 min 30 s left" in meter.text(10.0)


def test_progress_line_is_emitted_every_ten_seconds_until_the_work_ends() -> None:
    clock, lines = Clock(), list[str]()
    meter = Meter("x", 0.0)
    with Ticker(meter, lines.append, clock=lambda: clock.now, pause=clock.pause):
        clock.run(35)
        clock.end()
    assert lines == ["10 s so far", "20 s so far", "30 s so far"]


def test_reset_delays_the_next_progress_line_by_ten_seconds() -> None:
    clock, lines = Clock(), list[str]()
    with Ticker(Meter("x", 0.0), lines.append, clock=lambda: clock.now, pause=clock.pause) as ticker:
        clock.run(19, lambda: ticker.reset() if clock.now == 9 else None)
        clock.end()
    assert lines == ["19 s so far"]


def test_error_while_a_progress_line_is_printed_does_not_end_the_work() -> None:
    clock, attempts = Clock(), list[float]()

    def emit(_: str) -> None:
        attempts.append(clock.now)
        raise OSError(5, "Input/output error")

    with Ticker(Meter("x", 0.0), emit, clock=lambda: clock.now, pause=clock.pause):
        clock.run(25)
        clock.end()
    assert attempts == [10, 20]


class TestScreen:
    def screen(self, clock: Clock, *, quiet: bool = False, json_output: bool = False) -> Screen:
        return Screen(json_output=json_output, quiet=quiet, color=False, clock=lambda: clock.now, pause=clock.pause)

    @pytest.mark.parametrize("json_output", [False, True])
    def test_progress_without_a_terminal_is_printed_as_lines_on_stderr(
        self, capsys: pytest.CaptureFixture[str], json_output: bool
    ) -> None:
        clock = Clock()
        screen = self.screen(clock, json_output=json_output)
        screen.listen(Work("model m"), None)
        clock.run(10, lambda: screen.progress(2_000_000, 100_000_000))
        clock.end()
        screen.end()
        output = capsys.readouterr()
        assert output.err == "  model m: 20 MB of 100 MB, 2.0 MB/s, about 40 s left\n"
        assert output.out == ""

    def test_quiet_screen_prints_nothing_and_starts_no_thread(self, capsys: pytest.CaptureFixture[str]) -> None:
        clock = Clock()
        screen = self.screen(clock, quiet=True)
        screen.listen(Work("model m"), None)
        screen.progress(1, 2)
        screen.end()
        assert capsys.readouterr() == ("", "")

    def test_step_that_ends_at_once_prints_no_progress(self, capsys: pytest.CaptureFixture[str]) -> None:
        screen = Screen(json_output=False, quiet=False, color=False)
        for number in range(20):
            screen.watch(Work(f"s{number}"), None)
        screen.end()
        assert capsys.readouterr() == ("", "")

    def test_token_in_a_step_name_is_removed_from_the_progress_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        clock = Clock()
        screen = self.screen(clock)
        with screen.during(f"asking hf_{'s' * 20}"):
            clock.run(10)
            clock.end()
        assert "sssss" not in capsys.readouterr().err

    def test_progress_of_two_downloads_without_a_terminal_is_one_line_on_stderr(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock = Clock()
        bars = DownloadBars(
            "m", {"a": 80_000_000, "b": 20_000_000}, shown=True, clock=lambda: clock.now, pause=clock.pause
        )
        with bars:
            clock.run(10, lambda: bars.advance("a", 2_000_000))
            clock.end()
        assert capsys.readouterr() == ("", "  m: 20 MB of 100 MB, 2.0 MB/s, about 40 s left\n")


# A screen on a terminal. Its thread takes a sample for each byte "g" on stdin; another byte ends the thread.
LIVE = """
import os, sys
from provision.cli.output import Screen
now = [0.0]
def pause(seconds):
    now[0] += 1
    return os.read(0, 1) != b"g"
screen = Screen(json_output=True, quiet=False, color=False, clock=lambda: now[0], pause=pause)
screen.begin("model m")
screen.progress(20_000_000, 100_000_000)
screen._ticker._thread.join()
print("data")
screen.end()
"""


def test_terminal_shows_a_live_line_and_stdout_holds_only_data() -> None:
    main, terminal = pty.openpty()
    environment = dict(os.environ) | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE],
        cwd=CHECKOUT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    stdout, _ = process.communicate(b"ggx", timeout=600)
    os.close(terminal)
    shown = os.read(main, 100_000).decode()
    os.close(main)
    assert (process.returncode, stdout) == (0, b"data\n")
    assert "model m" in shown
    assert "20 MB of 100 MB" in shown
    assert "\x1b[?25h" in shown, "the cursor is visible again"


def test_folder_move_reports_its_bytes_and_its_copied_and_verified_files(tmp_path: Path, other_disk: Path) -> None:
    source = tmp_path / "cache"
    (source / "deep").mkdir(parents=True)
    for number in range(7):
        (source / "deep" / f"f{number}").write_bytes(bytes(10_000))
    reports: dict[str, list[int]] = {}

    def progress(count: int, total: int, unit: str = "bytes", /) -> None:
        done = reports.setdefault(unit, [0, 0])
        done[0] += count
        done[1] = total

    FolderMove(Journal(tmp_path / "journal"), progress).run([MovePair(source, other_disk / "cache")])
    assert reports == {"bytes": [70_000, 70_000], "files": [7, 7], "files proved": [7, 7]}


def test_hashing_of_files_reports_the_hashed_files_and_bytes(tmp_path: Path) -> None:
    files = []
    for number in range(40):
        (tmp_path / str(number)).write_bytes(bytes(number * 100_000))
        files.append((str(tmp_path / str(number)), hashing.sha256(tmp_path / str(number))))
    meter = Meter("verify", 0.0)
    assert hashing.mismatched_files(files, meter.add) == []
    meter.sample(1.0)
    assert meter.text(1.0).startswith("40 of 40 files, 78 MB of 78 MB, 78 MB/s")


def test_deep_check_of_an_environment_reports_its_bytes_and_files(tmp_path: Path, envs: Path, home: Path) -> None:
    """Check a small real environment, which `provision setup` has built, with the steps of setup."""
    (tmp_path / "host.toml").write_text("models = []\nrelocate = []\n")
    flags = ["--root", str(tmp_path / "root"), "--envs", str(envs), "--host", str(tmp_path / "host.toml"), "--json"]
    argv = [sys.executable, "-m", "provision", "setup", *flags]
    completed = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert json.loads(completed.stdout)["exit"] == 0, completed.stderr
    counts: dict[str, int] = {}

    def progress(count: int, total: int, unit: str = "bytes", /) -> None:
        counts[unit] = counts.get(unit, 0) + count

    host = resolve_host(str(tmp_path / "root"), tmp_path / "host.toml", envs)
    steps: list[Any] = plan.steps(host, Journal(tmp_path / "j"), progress)
    environment = next(step for step in steps if step.name == "environment diffusers")
    assert environment.check(deep=True).state is State.OK
    assert counts["bytes"] > 20_000
    assert counts["files"] >= 5


def test_build_of_an_environment_reports_install_bytes_of_torch_toml_as_its_total(tmp_path: Path, envs: Path) -> None:
    with (envs / "torch.toml").open("a") as file:
        file.write("install_bytes = 5_000\n")
    (tmp_path / "host.toml").write_text("models = []\nrelocate = []\n")
    totals = []

    def progress(count: int, total: int, unit: str = "bytes", /) -> None:
        totals.append((unit, total))

    host = resolve_host(str(tmp_path / "root"), tmp_path / "host.toml", envs)
    for step in plan.steps(host, Journal(tmp_path / "root/.firstlight/journal"), progress)[:2]:
        step.apply()
    assert ("bytes", 5_000) in totals
