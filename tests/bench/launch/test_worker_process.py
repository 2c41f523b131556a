"""The parent of the workers, against workers that misbehave in every way that a program can."""

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

from bench.core.protocol import Request, TorchQuery
from bench.core.result import Phases, Result, Sample, Status
from bench.launch import pipe, received_events, worker_process
from tests.bench.conftest import a_case
from tests.bench.fake_workers import PRELUDE
from tests.clock import Until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_HUB = Path(os.devnull)
HERE = Path(sys.executable)
GOOD_ANSWER = """
say({"result": plain(Result(case, Status.OK, samples=(Sample(1.0, (0.5, 0.5), 0.9),)))})
"""
TWO_SAMPLES = """
say({"phase": "first image"})
say({"phases": plain(Phases(1.0, 2.0, 3.0))})
say({"phase": "samples"})
say({"sample": plain(Sample(1.0, (0.5,), 0.9))})
say({"sample": plain(Sample(2.0, (0.6,), 1.9))})
"""
# A child of the worker that outlives it unless somebody ends it; the numbers of both are written down.
GRANDCHILD = """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], stdout=STDOUT, stderr=STDOUT)
Path("pids.part").write_text(f"{os.getpid()} {child.pid}")
Path("pids.part").rename("pids")
"""
DETACHED = GRANDCHILD.replace("STDOUT", "subprocess.DEVNULL")
HOLDS_THE_PIPE = GRANDCHILD.replace("STDOUT", "None")
KEPT = (Sample(1.0, (0.5,), 0.9), Sample(2.0, (0.6,), 1.9))
GUARD_SECONDS = 600.0  # ends a test that hangs; nothing is asserted of it


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs one case with a Python program in the worker's place."""

    def run_program(program: str, *, hangs: bool = False, seconds: float = GUARD_SECONDS) -> Result:
        file = tmp_path / "program.py"
        file.write_text(PRELUDE + program)
        monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
        if hangs:  # its deadline passes when it has written down its processes
            monkeypatch.setattr(pipe, "EVERY_SECONDS", 0.01)
            clock = Until(Path("pids").exists)
            monkeypatch.setattr(pipe, "time", clock)
            monkeypatch.setattr(worker_process, "time", clock)
        return worker_process.run_case(replace(a_request(), limit_seconds=seconds), HERE, hub=NO_HUB)

    return run_program


def a_request() -> Request:
    return Request(a_case(), time.time(), GUARD_SECONDS, GUARD_SECONDS, {}, None)


@pytest.fixture
def pids() -> Iterator[list[int]]:
    """The processes that a test's worker wrote down; whatever is left of them is ended after the test."""
    found: list[int] = []
    yield found
    for pid in found:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def written_pids() -> list[int]:
    return [int(word) for word in Path("pids").read_text().split()]


def has_ended(pid: int) -> bool:
    """Whether a process ends, or has; one that only waits for its parent to read its exit code has."""
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


def test_a_proper_answer_is_taken_as_it_is(run: Callable[..., Result]) -> None:
    result = run('say({"phase": "load"})' + GOOD_ANSWER)
    assert replace(result, timeline=()) == Result(a_case(), Status.OK, samples=(Sample(1.0, (0.5, 0.5), 0.9),))


def test_a_worker_is_told_the_case_and_where_it_may_read(run: Callable[..., Result]) -> None:
    result = run("""
words = [os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "PYTHONNOUSERSITE")]
say({"result": plain(Result(case, Status.ERROR, reason=" ".join(words)))})
""")
    assert result.case == a_case()
    assert result.reason == f"1 {os.devnull} 1"


def test_an_exit_without_a_result_shows_the_end_of_stderr(run: Callable[..., Result]) -> None:
    result = run("""
say({"phase": "imports"})
print("\\n".join(f"line {number}" for number in range(100)), file=sys.stderr)
sys.exit(3)
""")
    assert result.status is Status.ERROR
    assert result.reason is not None
    first, *tail = result.reason.splitlines()
    assert "'imports'" in first
    assert "exit 3" in first
    assert tail[-1] == "line 99"
    assert "line 5" not in tail


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [
        ("signal.SIGSEGV", Status.ERROR, "SIGSEGV"),
        ("signal.SIGKILL", Status.OOM, "SIGKILL"),
        # Real-time signals have numbers without a name of their own.
        ("signal.SIGRTMIN + 1", Status.ERROR, "35"),
    ],
)
def test_a_worker_that_dies_says_of_what_and_when(
    run: Callable[..., Result], number: str, status: Status, told: str
) -> None:
    result = run(f'say({{"phase": "load"}})\nos.kill(os.getpid(), {number})\nsignal.pause()')
    assert result.status is status
    assert told in (result.reason or "")
    assert "'load'" in (result.reason or "")


def test_samples_sent_before_death_are_kept(run: Callable[..., Result]) -> None:
    result = run(TWO_SAMPLES + "os.kill(os.getpid(), signal.SIGKILL)")
    assert result.status is Status.OOM
    assert result.samples == KEPT
    assert result.phases == Phases(1.0, 2.0, 3.0)
    assert "'samples'" in (result.reason or "")


def test_a_hanging_worker_is_ended_with_all_that_it_started(run: Callable[..., Result], pids: list[int]) -> None:
    # SIGTERM must not be a way out: a worker inside a kernel does not react to it either.
    result = run(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)" + TWO_SAMPLES + DETACHED + "signal.pause()", hangs=True
    )
    pids += written_pids()
    assert result.status is Status.TIMEOUT
    assert "'samples'" in (result.reason or "")
    assert result.samples == KEPT
    assert all(has_ended(pid) for pid in pids)


def test_seconds_without_a_core_do_not_count(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its deadline has passed before it began; it was ready all the time, so it is waited for."""
    monkeypatch.setattr(pipe, "waited_seconds", lambda _: GUARD_SECONDS)
    assert run(GOOD_ANSWER, seconds=-worker_process._GRACE_SECONDS).status is Status.OK


def test_a_worker_that_starves_to_the_end_is_not_called_hung(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "waited_seconds", lambda _: 1e6)
    monkeypatch.setattr(worker_process, "_STARVED_SECONDS", 0.0)
    result = run("signal.pause()", seconds=-worker_process._GRACE_SECONDS)
    assert result.status is Status.TIMEOUT
    assert "the worker starved in the phase 'start': it waited" in (result.reason or "")
    assert "hung" not in (result.reason or "")


def test_a_worker_that_is_silent_for_long_hangs(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_events, "_SILENT_SECONDS", 0.0)
    result = run("signal.pause()", seconds=1e6)
    assert "the worker hung in the phase 'start'" in (result.reason or "")


def test_the_kernel_counts_the_time_without_a_core() -> None:
    assert pipe.waited_seconds(os.getpid()) >= 0.0
    assert pipe.waited_seconds(1 << 30) == 0.0


@pytest.mark.parametrize("grandchild", [DETACHED, HOLDS_THE_PIPE], ids=["detached", "holds the pipe"])
def test_a_worker_that_fails_leaves_nothing_running(
    run: Callable[..., Result], pids: list[int], grandchild: str
) -> None:
    result = run(grandchild + "sys.exit(3)")
    pids += written_pids()
    assert all(has_ended(pid) for pid in pids)
    assert "exit 3" in (result.reason or ""), "it ended by itself; it did not hang"


def test_a_worker_that_closes_its_pipe_and_lives_on_is_ended(run: Callable[..., Result], pids: list[int]) -> None:
    # It writes its number down after it has closed the pipe: only then does its deadline pass.
    result = run(
        'os.close(1)\nPath("p").write_text(str(os.getpid()))\nPath("p").rename("pids")\nsignal.pause()', hangs=True
    )
    pids += written_pids()
    assert result.status is Status.TIMEOUT
    assert all(has_ended(pid) for pid in pids)


RUBBISH = [
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


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_rubbish_becomes_a_result_that_says_so(run: Callable[..., Result], rubbish: str) -> None:
    result = run(rubbish)
    assert result.status is Status.ERROR
    assert "printed 1 lines that are no answer" in (result.reason or "")
    assert "exit 0" in (result.reason or "")
    assert result.samples == ()


def test_rubbish_before_and_after_an_answer_does_not_spoil_it(run: Callable[..., Result]) -> None:
    noise = "\n".join(RUBBISH[:8])
    result = run(noise + GOOD_ANSWER + noise)
    assert result.status is Status.OK


def test_megabytes_without_an_end_of_line_are_survived(run: Callable[..., Result]) -> None:
    result = run("os.write(2, b'y')\nsys.stdout.write('x' * (8 << 20))\nsys.stdout.flush()\nsys.exit(5)")
    assert result.status is Status.ERROR
    assert "exit 5" in (result.reason or "")


def test_an_answer_after_megabytes_of_noise_is_heard(run: Callable[..., Result]) -> None:
    assert run("print('x' * (8 << 20), flush=True)" + GOOD_ANSWER).status is Status.OK


def test_megabytes_on_stderr_do_not_become_the_reason(run: Callable[..., Result]) -> None:
    result = run("sys.stderr.write('z' * (4 << 20) + ' the end')\nsys.exit(3)")
    reason = result.reason or ""
    assert "exit 3" in reason
    assert reason.endswith("the end")
    assert len(reason) < 10_000


def test_a_token_on_stderr_is_kept_out_of_the_reason(run: Callable[..., Result]) -> None:
    result = run('print("401 for hf_abcdefghijklmnop", file=sys.stderr)\nsys.exit(1)')
    assert "401 for hf_" in (result.reason or "")
    assert "abcdefghijklmnop" not in (result.reason or "")


def test_stderr_that_is_no_text_is_shown_as_well_as_it_can_be(run: Callable[..., Result]) -> None:
    result = run("os.write(2, b'bad \\xff byte')\nsys.exit(1)")
    assert "bad \N{REPLACEMENT CHARACTER} byte" in (result.reason or "")


def test_a_worker_that_does_not_read_its_request_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    # More than a pipe holds: the parent is still writing when the worker is gone.
    request = replace(a_request(), weights={"x": "x" * 1_000_000})
    monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), "-c", "raise SystemExit(7)"])
    result = worker_process.run_case(request, HERE, hub=NO_HUB)
    assert "exit 7" in (result.reason or "")


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "bin" / "python"
    result = worker_process.run_case(a_request(), absent, hub=NO_HUB)
    assert result.status is Status.ERROR
    assert f"{absent} does not start: No such file or directory" in (result.reason or "")
    assert "SIG" not in (result.reason or ""), "nothing ran, so nothing died of a signal"


def test_an_interpreter_without_torch_says_so_when_asked() -> None:
    # The toolbox has none; this is the real worker.
    found = worker_process.query(HERE)
    assert list(found) == ["error"]
    assert "No module named 'torch'" in found["error"]


def test_an_interpreter_that_is_not_there_says_so_when_asked(tmp_path: Path) -> None:
    assert "does not start" in worker_process.query(tmp_path / "python")["error"]


def test_a_real_worker_without_diffusers_ends_in_a_result() -> None:
    result = worker_process.run_case(a_request(), HERE, hub=NO_HUB)
    assert result.status is Status.ERROR
    assert result.reason is not None
    assert result.reason.startswith("ModuleNotFoundError: No module named")


class Counted(selectors.DefaultSelector):
    """Notes for how long the runner blocks each time, and lets the worker go on after four times without news."""

    limits: ClassVar[list[float | None]] = []
    silences = 0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(timeout)
        Counted.limits.append(timeout)
        Counted.silences += not events
        if Counted.silences == 4:
            Path("go").touch()
        return events


def test_the_parent_sleeps_while_the_worker_computes(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selectors, "DefaultSelector", Counted)
    monkeypatch.setattr(Counted, "limits", [])
    monkeypatch.setattr(Counted, "silences", 0)
    # The worker polls, so that the parent need not.
    program = 'say({"phase": "load"})\nimport select\nwhile not Path("go").exists(): select.select([], [], [], 0.01)\n'
    result = run(program + GOOD_ANSWER)
    assert result.status is Status.OK
    # It blocks for half a second each time. A loop that polls would pass less, and one that spins would block never.
    assert set(Counted.limits) == {pipe.EVERY_SECONDS}
    # Beside that it wakes for each line, for the pipe's end and for the process's: a loop that polls wakes far oftener.
    assert 4 <= Counted.silences <= len(Counted.limits) <= Counted.silences + 10


def test_an_interrupt_while_a_worker_starts_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives after the fork and before the body of the with block."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        worker_process, "worker_command", lambda _: [sys.executable, "-c", "import signal; signal.pause()"]
    )
    monkeypatch.setattr(worker_process, "WorkerMonitor", interrupt)
    worker = worker_process.Worker(TorchQuery(), HERE, NO_HUB)
    with pytest.raises(KeyboardInterrupt), worker:
        pass
    assert worker._process is not None
    assert worker._process.returncode is not None, "it was ended and waited for"


def test_a_worker_sees_the_measured_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A torch in the working folder, and one on a path of the user's: neither is the measured one.
    for folder in (Path.cwd(), tmp_path / "path"):
        folder.mkdir(exist_ok=True)
        (folder / "torch.py").write_text("raise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    assert "No module named 'torch'" in worker_process.query(HERE)["error"]


@pytest.mark.parametrize(
    "name",
    ["NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONHOME"],
)
def test_variables_of_other_programs_have_no_effect_on_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A case in tf32 would be one in fp32 and a good card slow, or a warning in torch's own import would end it."""
    monkeypatch.setenv(name, "0")
    file = tmp_path / "program.py"
    file.write_text(f"import json, os; print(json.dumps({{'query': {{'is': os.environ.get({name!r}, 'unset')}}}}))")
    monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
    assert worker_process.query(HERE) == {"is": "unset"}


def test_what_no_signal_ends_is_left_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs in a driver: here one whose end is not asked for in earnest."""
    monkeypatch.setattr(pipe, "_END_SECONDS", 0.01)
    hangs = [sys.executable, "-c", "import signal; signal.pause()"]
    monkeypatch.setattr(worker_process, "worker_command", lambda _: hangs)
    kept: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "kill", kept.append)
        with worker_process.Worker(TorchQuery(), HERE, NO_HUB) as worker:
            pass
    assert worker.code is None
    pipe.end(kept[0])
    assert kept[0].returncode < 0
