"""Every wait shows what is done, how much and how long it will take; the clock and the pauses are the tests' own."""

from __future__ import annotations

import json
import os
import pty
import queue
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from provision.cli.common import request_of
from provision.cli.models_output import DownloadBars
from provision.cli.output import Screen
from provision.core import hashing
from provision.core.progress import ChildWrites, Meter, Ticker, size_words, span_words
from provision.core.step import Check, State
from provision.host import facts
from provision.relocation.move import FolderMove, MovePair
from provision.setup import plan
from provision.volume.journal import Journal
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Clock:
    """Seconds that pass when a test lets a thread that pauses go on."""

    def __init__(self) -> None:
        self.now = 0.0
        self._go: queue.Queue[bool] = queue.Queue()
        self._paused: queue.Queue[None] = queue.Queue()

    def pause(self, seconds: float) -> bool:
        """The thread's side: wait until the test lets it go on; True ends it."""
        self._paused.put(None)
        return self._go.get()

    def run(self, seconds: int, act: Callable[[], None] = lambda: None) -> None:
        """Let so many seconds pass, a look of the thread in each."""
        for _ in range(seconds):
            self._paused.get(timeout=600)
            self.now += 1
            act()
            self._go.put(False)

    def end(self) -> None:
        """The last look is done, and the thread's next pause ends it."""
        self._go.put(True)


class Work:
    """A step that does nothing by itself."""

    essential = local = False

    def __init__(self, name: str) -> None:
        self.name = name

    def describe(self) -> str:
        return "nothing"

    def check(self, *, deep: bool = False) -> Check:
        return Check(State.OK, "fine")

    def apply(self) -> None: ...


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (812_000_000, "812 MB"),
        (2_900_000_000, "2.9 GB"),
        (9.96e9, "10 GB"),
    ],
)
def test_bytes_are_said_as_people_read_them(count: int, words: str) -> None:
    assert size_words(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (150, "2 min 30 s"), (180, "3 min"), (3900, "1 h 5 min"), (7200, "2 h")],
)
def test_times_are_said_as_people_read_them(seconds: float, words: str) -> None:
    assert span_words(seconds) == words


def test_a_download_has_its_bytes_its_rate_and_its_time_left() -> None:
    meter = Meter("environment diffusers", 0.0)
    meter.look(0.0)
    for second in range(1, 59):
        meter.add(14_000_000, 2_900_000_000)
        meter.look(float(second))
    assert meter.words(58.0) == "812 MB of 2.9 GB, 14 MB/s, about 2 min 29 s left"
    assert meter.share() == pytest.approx(0.28)


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    meter = Meter("model m", 0.0)
    meter.add(1_000_000_000, 4_000_000_000)  # it was quick at first
    meter.look(1.0)
    for second in range(2, 100):
        meter.add(1_000_000)
        meter.look(float(second))
    assert "1.0 MB/s" in meter.words(99.0)


def test_files_are_counted_and_tell_the_time_left_where_there_are_no_bytes() -> None:
    meter = Meter("relocate conda", 0.0)
    meter.add(5_000, 20_000, "files")
    meter.look(10.0)
    assert meter.words(10.0) == "5,000 of 20,000 files, about 30 s left"
    assert meter.share() == 0.25


def test_what_reports_nothing_shows_its_seconds() -> None:
    meter = Meter("smoke", 5.0)
    meter.look(17.0)
    assert meter.words(17.0) == "12 s so far"


def test_a_total_that_was_too_small_is_left_out() -> None:
    meter = Meter("x", 0.0)
    meter.add(300_000_000, 200_000_000)
    meter.look(10.0)
    assert meter.words(10.0) == "300 MB, 30 MB/s, 10 s so far"


def test_bytes_that_are_hashed_are_bytes_and_no_rate() -> None:
    meter = Meter("model m", 0.0)
    meter.add(1_200_000_000, 2_600_000_000, "bytes hashed")
    meter.look(12.0)
    assert meter.words(12.0) == "1.2 GB of 2.6 GB hashed, about 14 s left"


def test_an_installer_shows_what_its_processes_have_written(tmp_path: Path) -> None:
    """A real child writes five megabytes and holds still; what it wrote is kept when it has ended."""
    code = "import sys; open(sys.argv[1], 'wb').write(b'x' * 5_000_000); print('written', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    written = ChildWrites()
    if not hasattr(__import__("psutil").Process(), "io_counters"):
        pytest.skip("this system counts no bytes of a process")
    seen = written()
    assert seen >= 5_000_000
    child.communicate(b"")
    assert written() >= 5_000_000
    meter = Meter("environment e", 0.0, lambda: seen)
    meter.look(10.0)
    assert "5.0 MB written, 500 kB/s, 10 s so far" in meter.words(10.0)
    meter.add(0, 50_000_000)
    assert "5.0 MB of 50 MB written, 500 kB/s, about 1 min 30 s left" in meter.words(10.0)


def test_a_line_each_ten_seconds_and_none_after_the_end() -> None:
    clock, said = Clock(), list[str]()
    meter = Meter("x", 0.0)
    with Ticker(meter, said.append, clock=lambda: clock.now, pause=clock.pause):
        clock.run(35)
        clock.end()
    assert said == ["10 s so far", "20 s so far", "30 s so far"]


def test_something_else_that_is_said_puts_the_line_off() -> None:
    clock, said = Clock(), list[str]()
    with Ticker(Meter("x", 0.0), said.append, clock=lambda: clock.now, pause=clock.pause) as ticker:
        clock.run(19, lambda: ticker.heard() if clock.now == 9 else None)
        clock.end()
    assert said == ["19 s so far"]


def test_a_stream_that_is_gone_ends_no_work() -> None:
    clock, tried = Clock(), list[float]()

    def say(_: str) -> None:
        tried.append(clock.now)
        raise OSError(5, "Input/output error")

    with Ticker(Meter("x", 0.0), say, clock=lambda: clock.now, pause=clock.pause):
        clock.run(25)
        clock.end()
    assert tried == [10, 20]


class TestScreen:
    def screen(self, clock: Clock, *, quiet: bool = False, json_output: bool = False) -> Screen:
        return Screen(json_output=json_output, quiet=quiet, color=False, clock=lambda: clock.now, pause=clock.pause)

    @pytest.mark.parametrize("json_output", [False, True])
    def test_without_a_terminal_lines_go_to_stderr(self, capsys: pytest.CaptureFixture[str], json_output: bool) -> None:
        clock = Clock()
        screen = self.screen(clock, json_output=json_output)
        screen.listen(Work("model m"), None)
        clock.run(10, lambda: screen.progress(2_000_000, 100_000_000))
        clock.end()
        screen.end()
        said = capsys.readouterr()
        assert said.err == "  model m: 20 MB of 100 MB, 2.0 MB/s, about 40 s left\n"
        assert said.out == ""

    def test_quiet_says_nothing_and_starts_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        clock = Clock()
        screen = self.screen(clock, quiet=True)
        screen.listen(Work("model m"), None)
        screen.progress(1, 2)
        screen.end()
        assert capsys.readouterr() == ("", "")

    def test_a_step_that_ends_at_once_says_its_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        screen = Screen(json_output=False, quiet=False, color=False)
        for number in range(20):
            screen.watch(Work(f"s{number}"), None)
        screen.end()
        assert capsys.readouterr() == ("", "")

    def test_secrets_are_taken_out_of_a_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        clock = Clock()
        screen = self.screen(clock)
        with screen.during(f"asking hf_{'s' * 20}"):
            clock.run(10)
            clock.end()
        assert "sssss" not in capsys.readouterr().err

    def test_bars_of_a_model_are_lines_without_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        clock = Clock()
        bars = DownloadBars(
            "m", {"a": 80_000_000, "b": 20_000_000}, wanted=True, clock=lambda: clock.now, pause=clock.pause
        )
        with bars:
            clock.run(10, lambda: bars.advance("a", 2_000_000))
            clock.end()
        assert capsys.readouterr() == ("", "  m: 20 MB of 100 MB, 2.0 MB/s, about 40 s left\n")


# A screen on a terminal: the thread looks at once, and again whenever the other side of the pipe says so.
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


def test_on_a_terminal_it_is_a_live_line_and_stdout_is_data_alone() -> None:
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
    assert "\x1b[?25h" in shown, "the cursor is back"


def test_a_move_reports_its_files_and_bytes(tmp_path: Path, other_disk: Path) -> None:
    source = tmp_path / "cache"
    (source / "deep").mkdir(parents=True)
    for number in range(7):
        (source / "deep" / f"f{number}").write_bytes(bytes(10_000))
    reported: dict[str, list[int]] = {}

    def progress(count: int, total: int, unit: str = "bytes", /) -> None:
        done = reported.setdefault(unit, [0, 0])
        done[0] += count
        done[1] = total

    FolderMove(Journal(tmp_path / "journal"), progress).run([MovePair(source, other_disk / "cache")])
    assert reported == {"bytes": [70_000, 70_000], "files": [7, 7], "files proved": [7, 7]}


def test_hashing_reports_its_files_and_bytes(tmp_path: Path) -> None:
    files = []
    for number in range(40):
        (tmp_path / str(number)).write_bytes(bytes(number * 100_000))
        files.append((str(tmp_path / str(number)), hashing.sha256(tmp_path / str(number))))
    meter = Meter("verify", 0.0)
    assert hashing.differing(files, meter.add) == []
    meter.look(1.0)
    assert meter.words(1.0).startswith("40 of 40 files, 78 MB of 78 MB, 78 MB/s")


def test_verify_passes_its_progress_to_the_hashing(tmp_path: Path, envs: Path, home: Path) -> None:
    """The command's own steps, on a real small environment: each byte of a wheel is reported."""
    (tmp_path / "host.toml").write_text("models = []\nrelocate = []\n")
    words = ["--root", str(tmp_path / "root"), "--envs", str(envs), "--host", str(tmp_path / "host.toml"), "--json"]
    argv = [sys.executable, "-m", "provision", "setup", *words]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["exit"] == 0, done.stderr
    seen: dict[str, int] = {}

    def progress(count: int, total: int, unit: str = "bytes", /) -> None:
        seen[unit] = seen.get(unit, 0) + count

    request = request_of(str(tmp_path / "root"), tmp_path / "host.toml", envs)
    built: list[Any] = plan.steps(request, facts.probe(), Journal(tmp_path / "j"), progress)
    step = next(each for each in built if each.name == "environment diffusers")
    assert step.check(deep=True).state is State.OK
    assert seen["bytes"] > 20_000
    assert seen["files"] >= 5


def test_a_new_environment_tells_the_bytes_that_it_takes(tmp_path: Path, envs: Path) -> None:
    with (envs / "torch.toml").open("a") as file:
        file.write("install_bytes = 5_000\n")
    (tmp_path / "host.toml").write_text("models = []\nrelocate = []\n")
    totals = []

    def progress(count: int, total: int, unit: str = "bytes", /) -> None:
        totals.append((unit, total))

    request = request_of(str(tmp_path / "root"), tmp_path / "host.toml", envs)
    for step in plan.steps(request, facts.probe(), Journal(tmp_path / "root/.firstlight/journal"), progress)[:2]:
        step.apply()
    assert ("bytes", 5_000) in totals
