"""Tests how the parent handles a worker that crashes, hangs, floods its pipes or prints invalid lines."""

from __future__ import annotations

import os
import selectors
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
import pytest

from bench.core.result import Phases, Result, Sample, Status
from bench.core.worker_requests import CaseRequest, TorchQuery
from bench.launch import child_process, received_events, worker_process
from tests.bench.conftest import a_case
from tests.bench.fake_workers import PRELUDE
from tests.clock import Until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    RunCase = Callable[..., Result]

NO_HUB = Path(os.devnull)
OWN_PYTHON = Path(sys.executable)
GOOD_ANSWER = """
emit({"result": plain(Result(case, Status.OK, samples=(Sample(1.0, (0.5, 0.5), 0.9),)))})
"""
TWO_SAMPLES = """
emit({"phase": "first image"})
emit({"phases": plain(Phases(1.0, 2.0, 3.0))})
emit({"phase": "samples"})
emit({"sample": plain(Sample(1.0, (0.5,), 0.9))})
emit({"sample": plain(Sample(2.0, (0.6,), 1.9))})
"""
# Starts a child process that outlives the worker unless it is killed, and writes the ids of both to a file.
GRANDCHILD = """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], stdout=STDOUT, stderr=STDOUT)
Path("pids.part").write_text(f"{os.getpid()} {child.pid}")
Path("pids.part").rename("pids")
"""
DETACHED = GRANDCHILD.replace("STDOUT", "subprocess.DEVNULL")
HOLDS_THE_PIPE = GRANDCHILD.replace("STDOUT", "None")
KEPT = (Sample(1.0, (0.5,), 0.9), Sample(2.0, (0.6,), 1.9))
GUARD_SECONDS = 600.0  # the limit after which a hanging test fails


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunCase:
    """Return a function that runs one case with a Python program in place of the worker.

    With `hangs`, the deadline of the case passes as soon as the program has written its process ids. `seconds` is the
    time limit of the case.
    """

    def run_program(program: str, *, hangs: bool = False, seconds: float = GUARD_SECONDS) -> Result:
        file = tmp_path / "program.py"
        file.write_text(PRELUDE + program)
        monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
        if hangs:  # the clock jumps past the deadline when the file exists
            monkeypatch.setattr(child_process, "POLL_SECONDS", 0.01)
            clock = Until(Path("pids").exists)
            monkeypatch.setattr(child_process, "time", clock)
            monkeypatch.setattr(worker_process, "time", clock)
        return worker_process.run_case(replace(a_request(), limit_seconds=seconds), OWN_PYTHON, hub=NO_HUB)

    return run_program


def a_request() -> CaseRequest:
    return CaseRequest(a_case(), time.time(), GUARD_SECONDS, GUARD_SECONDS, {}, None)


@pytest.fixture
def pids() -> Iterator[list[int]]:
    """Yield a list of process ids for the test to fill; processes in it that still run are killed after the test."""
    process_ids: list[int] = []
    yield process_ids
    for pid in process_ids:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def written_pids() -> list[int]:
    """Return the process ids that the program has written."""
    return [int(word) for word in Path("pids").read_text().split()]


def has_ended(pid: int) -> bool:
    """Wait for the end of a process, and return whether it came in time; a zombie counts as ended."""
    deadline = time.monotonic() + GUARD_SECONDS
    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            with suppress(psutil.TimeoutExpired):
                process.wait(0.02)
    except psutil.NoSuchProcess:
        pass
    return True


def test_result_of_a_worker_is_returned_unchanged(run: RunCase) -> None:
    result = run('emit({"phase": "load"})' + GOOD_ANSWER)
    assert replace(result, timeline=()) == Result(a_case(), Status.OK, samples=(Sample(1.0, (0.5, 0.5), 0.9),))


def test_worker_receives_the_case_and_an_offline_environment(run: RunCase) -> None:
    result = run("""
words = [os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "PYTHONNOUSERSITE")]
emit({"result": plain(Result(case, Status.ERROR, reason=" ".join(words)))})
""")
    assert result.case == a_case()
    assert result.reason == f"1 {os.devnull} 1"


def test_worker_that_exits_without_a_result_is_an_error_with_the_end_of_its_stderr(run: RunCase) -> None:
    result = run("""
emit({"phase": "imports"})
print("\\n".join(f"line {number}" for number in range(100)), file=sys.stderr)
sys.exit(3)
""")
    assert result.status is Status.ERROR
    assert result.reason is not None
    first, *tail = result.reason.splitlines()
    assert "'imports'" in first
    assert "exit code 3" in first
    assert tail[-1] == "line 99"
    assert "line 5" not in tail


@pytest.mark.parametrize(
    ("number", "status", "expected"),
    [
        ("signal.SIGSEGV", Status.ERROR, "SIGSEGV"),
        ("signal.SIGKILL", Status.OOM, "SIGKILL"),
        # Real-time signals have numbers, but no names.
        ("signal.SIGRTMIN + 1", Status.ERROR, "35"),
    ],
)
def test_worker_killed_by_a_signal_is_an_error_or_oom_with_signal_and_phase(
    run: RunCase, number: str, status: Status, expected: str
) -> None:
    result = run(f'emit({{"phase": "load"}})\nos.kill(os.getpid(), {number})\nsignal.pause()')
    assert result.status is status
    assert expected in (result.reason or "")
    assert "'load'" in (result.reason or "")


def test_result_of_a_killed_worker_keeps_the_samples_that_it_has_sent(run: RunCase) -> None:
    result = run(TWO_SAMPLES + "os.kill(os.getpid(), signal.SIGKILL)")
    assert result.status is Status.OOM
    assert result.samples == KEPT
    assert result.phases == Phases(1.0, 2.0, 3.0)
    assert "'samples'" in (result.reason or "")


def test_hanging_worker_is_a_timeout_and_is_killed_with_its_children(run: RunCase, pids: list[int]) -> None:
    # The program ignores SIGTERM, like a worker that is inside a GPU kernel.
    result = run(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)" + TWO_SAMPLES + DETACHED + "signal.pause()", hangs=True
    )
    pids += written_pids()
    assert result.status is Status.TIMEOUT
    assert "'samples'" in (result.reason or "")
    assert result.samples == KEPT
    assert all(has_ended(pid) for pid in pids)


def test_deadline_is_extended_by_the_time_without_a_core(run: RunCase, monkeypatch: pytest.MonkeyPatch) -> None:
    # The deadline has passed before the worker starts, and the worker has waited for a core ever since.
    monkeypatch.setattr(child_process, "waited_seconds", lambda _: GUARD_SECONDS)
    assert run(GOOD_ANSWER, seconds=-worker_process._GRACE_SECONDS).status is Status.OK


def test_worker_that_waited_for_a_core_is_reported_as_starved(run: RunCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "waited_seconds", lambda _: 1e6)
    monkeypatch.setattr(worker_process, "_STARVED_SECONDS", 0.0)
    result = run("signal.pause()", seconds=-worker_process._GRACE_SECONDS)
    assert result.status is Status.TIMEOUT
    assert "the worker starved in the phase 'start': it waited" in (result.reason or "")
    assert "hung" not in (result.reason or "")


def test_worker_silent_past_the_limit_is_reported_as_hung(run: RunCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_events, "_SILENT_SECONDS", 0.0)
    monkeypatch.setattr(child_process, "waited_seconds", lambda _: 0.0)  # or a busy machine could make it starved
    result = run("signal.pause()", seconds=1e6)
    assert "the worker hung in the phase 'start'" in (result.reason or "")


def test_waited_seconds_are_zero_for_an_unknown_process() -> None:
    assert child_process.waited_seconds(os.getpid()) >= 0.0
    assert child_process.waited_seconds(1 << 30) == 0.0


@pytest.mark.parametrize(
    "grandchild", [DETACHED, HOLDS_THE_PIPE], ids=["child with its own pipes", "child that keeps the pipe open"]
)
def test_children_of_a_worker_that_exits_with_3_are_killed(run: RunCase, pids: list[int], grandchild: str) -> None:
    result = run(grandchild + "sys.exit(3)")
    pids += written_pids()
    assert all(has_ended(pid) for pid in pids)
    assert "exit code 3" in (result.reason or ""), "the worker ended by itself"


def test_worker_that_closes_its_pipe_and_goes_on_is_a_timeout_and_is_killed(run: RunCase, pids: list[int]) -> None:
    # The program writes its process id after closing the pipe; only then does the deadline pass.
    result = run(
        'os.close(1)\nPath("p").write_text(str(os.getpid()))\nPath("p").rename("pids")\nsignal.pause()', hangs=True
    )
    pids += written_pids()
    assert result.status is Status.TIMEOUT
    assert all(has_ended(pid) for pid in pids)


INVALID_LINES = [
    "os.write(1, b'hello\\n')",
    "os.write(1, b'\\xff\\xfe\\xfa\\n')",
    "os.write(1, b'\\n')",
    "os.write(1, b'3\\n')",
    "os.write(1, b'[1]\\n')",
    "os.write(1, b'\"phase\"\\n')",
    'os.write(1, b\'{"sample": {"seconds": "fast"}}\\n\')',
    "os.write(1, b'{\"phases\": 3}\\n')",
    "os.write(1, b'{\"result\": {}}\\n')",
    'os.write(1, b\'{"result": {"case": 1}}\\n\')',
    "os.write(1, b'[' * 60_000 + b'\\n')",
]


@pytest.mark.parametrize("program", INVALID_LINES)
def test_worker_that_prints_only_an_invalid_line_is_an_error_that_counts_the_lines(run: RunCase, program: str) -> None:
    result = run(program)
    assert result.status is Status.ERROR
    assert "printed 1 lines that are not events" in (result.reason or "")
    assert "exit code 0" in (result.reason or "")
    assert result.samples == ()


def test_result_between_invalid_lines_is_received(run: RunCase) -> None:
    noise = "\n".join(INVALID_LINES[:8])
    result = run(noise + GOOD_ANSWER + noise)
    assert result.status is Status.OK


def test_worker_that_prints_megabytes_without_a_newline_is_an_error(run: RunCase) -> None:
    result = run("os.write(2, b'y')\nsys.stdout.write('x' * (8 << 20))\nsys.stdout.flush()\nsys.exit(5)")
    assert result.status is Status.ERROR
    assert "exit code 5" in (result.reason or "")


def test_result_after_megabytes_of_invalid_text_is_received(run: RunCase) -> None:
    assert run("print('x' * (8 << 20), flush=True)" + GOOD_ANSWER).status is Status.OK


def test_reason_of_an_error_has_only_the_end_of_a_long_stderr(run: RunCase) -> None:
    result = run("sys.stderr.write('z' * (4 << 20) + ' the end')\nsys.exit(3)")
    reason = result.reason or ""
    assert "exit code 3" in reason
    assert reason.endswith("the end")
    assert len(reason) < 10_000


def test_token_on_stderr_of_a_worker_is_redacted_in_the_reason(run: RunCase) -> None:
    result = run('print("401 for hf_abcdefghijklmnop", file=sys.stderr)\nsys.exit(1)')
    assert "401 for hf_" in (result.reason or "")
    assert "abcdefghijklmnop" not in (result.reason or "")


def test_invalid_utf8_on_stderr_is_replaced_in_the_reason(run: RunCase) -> None:
    result = run("os.write(2, b'bad \\xff byte')\nsys.exit(1)")
    assert "bad \N{REPLACEMENT CHARACTER} byte" in (result.reason or "")


def test_worker_that_exits_before_it_reads_its_request_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # The request is larger than a pipe's buffer, so the parent is still writing when the worker exits.
    request = replace(a_request(), weights={"x": "x" * 1_000_000})
    monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), "-c", "raise SystemExit(7)"])
    result = worker_process.run_case(request, OWN_PYTHON, hub=NO_HUB)
    assert "exit code 7" in (result.reason or "")


def test_absent_interpreter_is_an_error_that_names_its_path(tmp_path: Path) -> None:
    absent = tmp_path / "bin" / "python"
    result = worker_process.run_case(a_request(), absent, hub=NO_HUB)
    assert result.status is Status.ERROR
    assert f"{absent} does not start: No such file or directory" in (result.reason or "")
    assert "SIG" not in (result.reason or ""), "no process ran, so no signal ended it"


def test_query_of_an_interpreter_without_torch_returns_the_import_error() -> None:
    # firstlight's own environment has no torch; the worker is the real one.
    answer = worker_process.query(OWN_PYTHON)
    assert list(answer) == ["error"]
    assert "No module named 'torch'" in answer["error"]


def test_query_of_an_absent_interpreter_returns_an_error(tmp_path: Path) -> None:
    assert "does not start" in worker_process.query(tmp_path / "python")["error"]


def test_real_worker_without_torch_and_diffusers_is_an_error_with_the_import_error() -> None:
    result = worker_process.run_case(a_request(), OWN_PYTHON, hub=NO_HUB)
    assert result.status is Status.ERROR
    assert result.reason is not None
    assert result.reason.startswith("ModuleNotFoundError: No module named")


class CountingSelector(selectors.DefaultSelector):
    """Records the timeout of each wait; after four without an event, creates the file that ends the worker's wait."""

    limits: ClassVar[list[float | None]] = []
    silences = 0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(timeout)
        CountingSelector.limits.append(timeout)
        CountingSelector.silences += not events
        if CountingSelector.silences == 4:
            Path("go").touch()
        return events


def test_parent_waits_in_select_while_the_worker_computes(run: RunCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectors, "DefaultSelector", CountingSelector)
    monkeypatch.setattr(CountingSelector, "limits", [])
    monkeypatch.setattr(CountingSelector, "silences", 0)
    # The worker polls for the file, so that the test does not need another signal.
    program = 'emit({"phase": "load"})\nimport select\nwhile not Path("go").exists(): select.select([], [], [], 0.01)\n'
    result = run(program + GOOD_ANSWER)
    assert result.status is Status.OK
    # Each wait has a timeout of half a second; a busy loop would have a shorter one, or none.
    assert set(CountingSelector.limits) == {child_process.POLL_SECONDS}
    # The parent also wakes for each line, and for the end of the pipe and the process. A busy loop would wake far more
    # often.
    assert 4 <= CountingSelector.silences <= len(CountingSelector.limits) <= CountingSelector.silences + 10


def test_interrupt_between_fork_and_with_block_kills_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    # WorkerMonitor is created in __enter__, after the process was started.
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        worker_process, "worker_command", lambda _: [sys.executable, "-c", "import signal; signal.pause()"]
    )
    monkeypatch.setattr(worker_process, "WorkerMonitor", interrupt)
    worker = worker_process.Worker(TorchQuery(), OWN_PYTHON, NO_HUB)
    with pytest.raises(KeyboardInterrupt), worker:
        pass
    assert worker._process is not None
    assert worker._process.returncode is not None, "the worker was killed and reaped"


def test_exit_code_of_a_worker_that_cannot_be_killed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # `kill` is replaced by a function that only records the process, which survives like one that hangs in a driver.
    monkeypatch.setattr(child_process, "_END_SECONDS", 0.01)
    hanging = [sys.executable, "-c", "import signal; signal.pause()"]
    monkeypatch.setattr(worker_process, "worker_command", lambda _: hanging)
    processes: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(child_process, "kill", processes.append)
        with worker_process.Worker(TorchQuery(), OWN_PYTHON, NO_HUB) as worker:
            pass
    assert worker.code is None
    child_process.end(processes[0])
    assert processes[0].returncode < 0
