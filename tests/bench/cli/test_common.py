"""Tests the display of a run: on a terminal, without one, in every encoding, and after the terminal has gone."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest

from bench.cli import common
from bench.core.codec import loads
from bench.core.result import Run
from bench.launch import worker_process
from provision.core import streams
from tests.bench.conftest import command, environment
from tests.bench.fake_workers import WORKER
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# `bench` with a program in the worker's place: the last argument of the command's own first ones.
WITH = """
import sys
sys.path.insert(0, {checkout!r})
from bench.cli import main as cli; from bench.launch import worker_process as runner
runner.worker_command = lambda python: [str(python), {program!r}]
sys.argv = ["bench", *sys.argv[1:]]
{before}
cli.main()
"""
ENDS = "for _ in range(6): image()\nend()\n"
# The first case ends, the second says that it is at work and waits for its end.
WAITS = f"""
if turn > 1:
    say({{"phase": "load"}})
    Path("pid").write_text(str(os.getpid()))
    signal.pause()
{ENDS}"""


class Clock:
    """The test's own."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    """A stderr that may be a terminal, and may be gone."""

    is_terminal = is_gone = False

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        if self.is_gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(common, "sys", SimpleNamespace(stderr=stream))  # pytest puts its own back
    monkeypatch.setenv("TERM", "xterm")
    return stream


def test_without_a_terminal_a_line_comes_every_ten_seconds(stderr: Stream) -> None:
    clock = Clock()
    progress = common.Progress(quiet=False, now=clock)
    progress.begin("[1/2] a")
    for clock.now in (1.0, 9.9, 10.0, 11.0, 19.9, 20.0):
        progress.at(lambda: f"at {clock.now:g}")
    progress.say("[1/2] a 3 s")
    assert stderr.getvalue() == "at 10\nat 20\n[1/2] a 3 s\n"


def test_a_case_that_has_ended_starts_the_ten_seconds_anew(stderr: Stream) -> None:
    clock = Clock()
    progress = common.Progress(quiet=False, now=clock)
    clock.now = 9.0
    progress.say("one")
    clock.now = 15.0
    progress.at(lambda: "two")
    assert stderr.getvalue() == "one\n"


def test_on_a_terminal_a_line_is_redrawn_once_a_second(stderr: Stream) -> None:
    stderr.is_terminal = True
    clock = Clock()
    progress = common.Progress(quiet=False, now=clock)
    progress.begin("[1/2] a")
    for clock.now in (0.5, 1.0, 1.5, 2.0):
        progress.at(lambda: f"at {clock.now:g}")
    progress.say("done")
    assert stderr.getvalue() == "\r\x1b[K[1/2] a …\r\x1b[Kat 1\r\x1b[Kat 2\r\x1b[Kdone\n"


def test_a_line_that_is_not_shown_is_not_made(stderr: Stream) -> None:
    progress = common.Progress(quiet=True, now=Clock())
    progress.at(lambda: pytest.fail("it is made"))
    progress.say("nothing")
    assert stderr.getvalue() == ""


def test_a_terminal_that_is_gone_ends_the_showing_alone(stderr: Stream) -> None:
    stderr.is_gone = True
    progress = common.Progress(quiet=False, now=Clock())
    progress.say("one")
    stderr.is_gone = False
    progress.say("two")
    assert stderr.getvalue() == ""


@pytest.fixture
def bench(tmp_path: Path) -> list[str]:
    """`bench run tiny`, with a worker that waits in its second case; its stdin is its session's own terminal."""
    return whole(tmp_path, WAITS, "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)")


def whole(folder: Path, program: str, before: str = "") -> list[str]:
    (folder / "program.py").write_text(WORKER + program)
    script = WITH.format(checkout=str(CHECKOUT), program=str(folder / "program.py"), before=before)
    words = command("run", "tiny", "--device", "cpu", "--root", folder / "root", "--python", sys.executable)
    return [sys.executable, "-c", script, *words[3:], "--out", str(folder / "kept")]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gb18030", "gbk", "utf-8"])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_every_encoding_shows_a_run(tmp_path: Path, encoding: str, form: list[str]) -> None:
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [*whole(tmp_path, ENDS), *form], capture_output=True, env=environment(**changes), cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    (kept,) = tmp_path.glob("kept/*/run.json")
    run = loads(kept.read_text(encoding="utf-8"), Run)
    if form:
        assert json.loads(shown)["id"] == run.id
    else:
        assert ("±" if encoding != "ascii" else "+/-") in shown
        assert "\\u" not in shown
        assert kept.with_name("report.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")


def test_what_an_encoding_lacks_is_written_as_ascii_has_it() -> None:
    codecs.register_error("firstlight", streams._encode)
    assert "┏━┓ 1 ± 2 …".encode("ascii", "firstlight") == b"+-+ 1 +/- 2 ..."
    assert "光".encode("ascii", "firstlight") == b"\\u5149"


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    for end in (ours, theirs):
        with suppress(OSError):
            os.close(end)


def worker_of(folder: Path, process: subprocess.Popen[bytes]) -> psutil.Process:
    """The worker, once it waits in its second case."""
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert process.poll() is None, "it has ended"
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    return psutil.Process(int((folder / "pid").read_text()))


@pytest.mark.usefixtures("_signals_are_heard")
def test_a_terminal_that_goes_away_ends_the_run_and_keeps_what_was_measured(
    bench: list[str], tmp_path: Path, terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal
    with subprocess.Popen(
        bench,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env=environment(TERM="xterm"),
        start_new_session=True,
    ) as process:
        worker = worker_of(tmp_path, process)
        os.close(theirs)
        os.close(ours)  # the kernel sends SIGHUP to the session's leader
        assert process.wait() == 130
    psutil.wait_procs([worker], timeout=600)
    assert not worker.is_running()
    (kept,) = tmp_path.glob("kept/*/run.json")
    run = loads(kept.read_text(encoding="utf-8"), Run)
    assert [result.status.value for result in run.results] == ["ok", "skipped"]
    assert run.verdict.state.value == "could not judge"
    assert run.verdict.reasons[0] == "interrupted after 1 of 2 cases"


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path, terminal: tuple[int, int]) -> None:
    """SIGHUP is ignored, and every write to the terminal fails: the run ends, and is kept."""
    ours, theirs = terminal
    os.close(ours)
    done = subprocess.run(
        whole(tmp_path, ENDS, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env=environment(TERM="xterm"),
        check=False,
    )
    assert done.returncode == 0
    (kept,) = tmp_path.glob("kept/*/run.json")
    assert [result.status.value for result in loads(kept.read_text(encoding="utf-8"), Run).results] == ["ok", "ok"]


def test_a_run_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.run import suite_run
    from tests.bench.fake_workers import Quiet
    from tests.bench.run.test_suite_run import wish_in

    (tmp_path / "program.py").write_text(WORKER + ENDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(tmp_path / "program.py")])
    progress = Quiet()
    suite_run.run(wish_in(tmp_path, 60.0), progress)
    assert any("[1/2] tiny-ddpm-cpu-fp32" in line and "image 3 of about" in line for line in progress.doing)
    assert any("[2/2] tiny-sd" in line for line in progress.doing)
