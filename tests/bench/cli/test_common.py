"""Tests the progress lines of a run: on a terminal, without one, in several encodings, and on a closed terminal."""

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

# Runs `bench` with a Python program in place of the worker; the code `before` runs first.
BENCH_WITH_PROGRAM = """
import sys
sys.path.insert(0, {checkout!r})
from bench.cli import main as cli; from bench.launch import worker_process as runner
runner.worker_command = lambda python: [str(python), {program!r}]
sys.argv = ["bench", *sys.argv[1:]]
{before}
cli.main()
"""
ENDS = "for _ in range(6): image()\nend()\n"
# The first case ends; the second writes its process id to a file, and then waits until it is killed.
WAITS = f"""
if turn > 1:
    emit({{"phase": "load"}})
    Path("pid").write_text(str(os.getpid()))
    signal.pause()
{ENDS}"""


class Clock:
    """Returns, when called, the time in seconds that the test has set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    """Stands in for stderr: a test sets whether it is a terminal, and whether a write fails because it is closed."""

    is_terminal = is_closed = False

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        if self.is_closed:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(common, "sys", SimpleNamespace(stderr=stream))  # sys.stderr itself belongs to pytest
    monkeypatch.setenv("TERM", "xterm")
    return stream


def test_progress_without_a_terminal_is_written_once_in_ten_seconds(stderr: Stream) -> None:
    clock = Clock()
    progress = common.Progress(quiet=False, now=clock)
    progress.begin("[1/2] a")
    for clock.now in (1.0, 9.9, 10.0, 11.0, 19.9, 20.0):
        progress.update(lambda: f"at {clock.now:g}")
    progress.report("[1/2] a 3 s")
    assert stderr.getvalue() == "at 10\nat 20\n[1/2] a 3 s\n"


def test_reported_line_restarts_the_ten_seconds_until_the_next_progress_line(stderr: Stream) -> None:
    clock = Clock()
    progress = common.Progress(quiet=False, now=clock)
    clock.now = 9.0
    progress.report("one")
    clock.now = 15.0
    progress.update(lambda: "two")
    assert stderr.getvalue() == "one\n"


def test_progress_on_a_terminal_is_redrawn_once_a_second(stderr: Stream) -> None:
    stderr.is_terminal = True
    clock = Clock()
    progress = common.Progress(quiet=False, now=clock)
    progress.begin("[1/2] a")
    for clock.now in (0.5, 1.0, 1.5, 2.0):
        progress.update(lambda: f"at {clock.now:g}")
    progress.report("done")
    assert stderr.getvalue() == "\r\x1b[K[1/2] a …\r\x1b[Kat 1\r\x1b[Kat 2\r\x1b[Kdone\n"


def test_quiet_progress_does_not_build_its_lines(stderr: Stream) -> None:
    progress = common.Progress(quiet=True, now=Clock())
    progress.update(lambda: pytest.fail("the line was built"))
    progress.report("nothing")
    assert stderr.getvalue() == ""


def test_progress_writes_no_more_lines_after_its_terminal_was_closed(stderr: Stream) -> None:
    stderr.is_closed = True
    progress = common.Progress(quiet=False, now=Clock())
    progress.report("one")
    stderr.is_closed = False
    progress.report("two")
    assert stderr.getvalue() == ""


@pytest.fixture
def bench(tmp_path: Path) -> list[str]:
    """Return the command line of a `bench run tiny` whose worker waits in its second case.

    The command makes its stdin its controlling terminal.
    """
    return command_line(tmp_path, WAITS, "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)")


def command_line(folder: Path, program: str, before: str = "") -> list[str]:
    """Return the command line of `bench run tiny` with a program in place of the worker."""
    (folder / "program.py").write_text(WORKER + program)
    script = BENCH_WITH_PROGRAM.format(checkout=str(CHECKOUT), program=str(folder / "program.py"), before=before)
    words = command("run", "tiny", "--device", "cpu", "--root", folder / "root", "--python", sys.executable)
    return [sys.executable, "-c", script, *words[3:], "--out", str(folder / "kept")]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gb18030", "gbk", "utf-8"])
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_run_is_printed_in_the_encoding_of_stdout(tmp_path: Path, encoding: str, form: list[str]) -> None:
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [*command_line(tmp_path, ENDS), *form],
        capture_output=True,
        env=environment(**changes),
        cwd=tmp_path,
        check=False,
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


def test_characters_that_ascii_lacks_are_replaced_by_similar_ones_or_escapes() -> None:
    codecs.register_error("firstlight", streams._encode)
    assert "┏━┓ 1 ± 2 …".encode("ascii", "firstlight") == b"+-+ 1 +/- 2 ..."
    assert "光".encode("ascii", "firstlight") == b"\\u5149"


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Yield the file descriptors of a pseudo-terminal: (controller, device)."""
    controller, device = pty.openpty()
    yield controller, device
    for end in (controller, device):
        with suppress(OSError):
            os.close(end)


def worker_of(folder: Path, process: subprocess.Popen[bytes]) -> psutil.Process:
    """Wait until the worker waits in its second case, and return the worker."""
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert process.poll() is None, "the command has ended"
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    return psutil.Process(int((folder / "pid").read_text()))


@pytest.mark.usefixtures("_default_sigint")
def test_run_whose_terminal_is_closed_ends_its_worker_and_stores_the_results_so_far(
    bench: list[str], tmp_path: Path, terminal: tuple[int, int]
) -> None:
    controller, device = terminal
    with subprocess.Popen(
        bench,
        stdin=device,
        stdout=device,
        stderr=device,
        cwd=tmp_path,
        env=environment(TERM="xterm"),
        start_new_session=True,
    ) as process:
        worker = worker_of(tmp_path, process)
        os.close(device)
        os.close(controller)  # the kernel sends SIGHUP to the session's leader
        assert process.wait() == 130
    psutil.wait_procs([worker], timeout=600)
    assert not worker.is_running()
    (kept,) = tmp_path.glob("kept/*/run.json")
    run = loads(kept.read_text(encoding="utf-8"), Run)
    assert [result.status.value for result in run.results] == ["ok", "skipped"]
    assert run.verdict.state.value == "could not judge"
    assert run.verdict.reasons[0] == "interrupted after 1 of 2 cases"


def test_run_under_nohup_completes_after_its_terminal_was_closed(tmp_path: Path, terminal: tuple[int, int]) -> None:
    # SIGHUP is ignored, and each write to the terminal fails.
    controller, device = terminal
    os.close(controller)
    done = subprocess.run(
        command_line(tmp_path, ENDS, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"),
        stdin=subprocess.DEVNULL,
        stdout=device,
        stderr=device,
        cwd=tmp_path,
        env=environment(TERM="xterm"),
        check=False,
    )
    assert done.returncode == 0
    (kept,) = tmp_path.glob("kept/*/run.json")
    assert [result.status.value for result in loads(kept.read_text(encoding="utf-8"), Run).results] == ["ok", "ok"]


def test_progress_line_names_the_case_and_its_current_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.run import suite_run
    from tests.bench.fake_workers import RecordedProgress
    from tests.bench.run.test_suite_run import request_in

    (tmp_path / "program.py").write_text(WORKER + ENDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(tmp_path / "program.py")])
    progress = RecordedProgress()
    suite_run.run(request_in(tmp_path, 60.0), progress)
    assert any("[1/2] tiny-ddpm-cpu-fp32" in line and "image 3 of about" in line for line in progress.updates)
    assert any("[2/2] tiny-sd" in line for line in progress.updates)
