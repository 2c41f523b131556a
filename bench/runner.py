"""The parent of the workers: starts one for each case, waits on its pipe with a deadline, never spins."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench.result import Phases, Result, Sample, Status, plain, record
from provision.command import redact, signal_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.worker import Request

_PACKAGE = Path(__file__).resolve().parent
# The worker sees this one package and otherwise only what is installed in the measured environment: neither the
# working folder nor the toolbox's packages, which may lie beside ours.
_LAUNCH = """
import runpy, sys, types
sys.path[:] = [entry for entry in sys.path if entry]
sys.modules["bench"] = types.ModuleType("bench")
sys.modules["bench"].__path__ = [sys.argv[1]]
runpy.run_module(sys.argv[2], run_name="__main__", alter_sys=True)
"""
_GRACE_SECONDS = 20.0
_TAIL_LINES = 8
_TAIL_BYTES = 8192
_LONGEST_LINE = 16 << 20  # a thousand times the longest answer
_NOT_STARTED = 127  # as a shell has it


@dataclass
class _Heard:
    """What a worker has said so far."""

    phase: str = "start"
    phases: Phases = field(default_factory=Phases)
    samples: list[Sample] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    rubbish: int = 0


def run_case(request: Request, python: Path, *, hub: Path) -> Result:
    """Run one case in a fresh process.

    A worker that dies, hangs or prints rubbish becomes a result with its status and the end of its stderr;
    the samples that it sent before are kept.

    Args:
        request: what to measure.
        python: the interpreter to measure under.
        hub: the hub cache that the worker may read.
    """
    deadline = time.monotonic() + request.limit_seconds + _GRACE_SECONDS
    heard, code, stderr = _talk(plain(request), python, hub, deadline)
    if heard.answer is not None and "result" in heard.answer:
        with contextlib.suppress(ValueError, TypeError):
            result: Result = record(heard.answer["result"], Result, "result")
            return result
        heard.rubbish += 1
    status, reason = _autopsy(heard, code)
    return Result(
        request.case,
        status,
        reason=f"{reason}\n{stderr}".strip(),
        phases=heard.phases,
        samples=tuple(heard.samples),
    )


def query(python: Path, *, seconds: float = 120.0) -> dict[str, Any]:
    """Ask the interpreter's torch what it can compute on; {"error": text} where it cannot say."""
    heard, code, stderr = _talk({"query": True}, python, Path(os.devnull), time.monotonic() + seconds)
    if heard.answer is not None and isinstance(heard.answer.get("query"), dict):
        return dict(heard.answer["query"])
    return {"error": stderr or f"exit {code}"}


def worker_command(python: Path) -> Sequence[str]:
    """How a worker is started; tests put their own program here."""
    return [str(python), "-c", _LAUNCH, str(_PACKAGE), "bench.worker"]


def _talk(request: dict[str, Any], python: Path, hub: Path, deadline: float) -> tuple[_Heard, int | None, str]:
    """Start a worker, hand it its request, listen until it ends: what it said, its exit code, the end of its stderr.

    The code is None when it was stopped for time.
    """
    environment = dict(os.environ)
    environment |= {
        "PYTHONNOUSERSITE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(hub),
    }
    # Compiled bytecode is what makes the second case start in a third of the time; and the measured interpreter
    # shall find its own packages alone.
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME"):
        environment.pop(name, None)
    heard = _Heard()
    with tempfile.TemporaryFile() as errors:
        # An interrupt between the fork and our hold on the process would leave a worker that nobody ends.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process = subprocess.Popen(
                worker_command(python),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # its whole group can be ended, and Ctrl-C reaches it through us alone
            )
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            return heard, _NOT_STARTED, f"{python} does not start: {error.strerror}"
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            with contextlib.suppress(BrokenPipeError), process.stdin:  # type: ignore[union-attr]  # it is a pipe
                process.stdin.write(json.dumps(request).encode())  # type: ignore[union-attr]
            ended = _listen(process, deadline, lambda line: _hear(heard, line))
        finally:
            _end(process)
        return heard, process.returncode if ended else None, _tail(errors)


def _tail(errors: IO[bytes]) -> str:
    """The last lines of a worker's stderr, without secrets."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _TAIL_BYTES))
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return redact("\n".join(lines[-_TAIL_LINES:]))


def _listen(process: subprocess.Popen[bytes], deadline: float, hear: Callable[[bytes], None]) -> bool:
    """Read whole lines until the worker has ended (True) or the deadline passes (False); blocked, not polling.

    The end of the process is waited for beside the pipe: something that it started may hold the pipe open.
    """
    assert process.stdout is not None  # noqa: S101 (opened as a pipe)
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    with selectors.DefaultSelector() as ready, _ending(process) as ending:
        ready.register(pipe, selectors.EVENT_READ)
        if ending is not None:
            ready.register(ending, selectors.EVENT_READ)
        rest = b""
        while (left := deadline - time.monotonic()) > 0:
            events = {key.fd for key, _ in ready.select(left)}
            rest, closed = _drain(pipe, rest, deadline, hear)
            if ending in events:
                return True
            if closed:
                ready.unregister(pipe)
                if ending is None:
                    break
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[int | None]:
    """A descriptor that can be read when the process has ended; None where the system has none (not Linux)."""
    if not hasattr(os, "pidfd_open"):
        yield None
        return
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _drain(pipe: int, rest: bytes, deadline: float, hear: Callable[[bytes], None]) -> tuple[bytes, bool]:
    """Read all that the pipe holds now. Returns the line that has not ended yet, and whether the pipe is closed."""
    while time.monotonic() < deadline:
        try:
            block = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return rest, False
        if not block:
            return rest, True
        *lines, rest = (rest + block).split(b"\n")
        rest = rest[-_LONGEST_LINE:]
        for line in lines:
            hear(line)
    return rest, False


def _hear(heard: _Heard, line: bytes) -> None:
    try:
        event = json.loads(line)
        if not isinstance(event, dict):
            heard.rubbish += 1
        elif "phase" in event:
            heard.phase = str(event["phase"])
        elif "phases" in event:
            heard.phases = record(event["phases"], Phases, "phases")
        elif "sample" in event:
            heard.samples.append(record(event["sample"], Sample, "sample"))
        elif "result" in event or "query" in event:
            heard.answer = event
        else:
            heard.rubbish += 1
    except (ValueError, TypeError, RecursionError):  # rubbish may be nested a thousand deep
        heard.rubbish += 1


def _autopsy(heard: _Heard, code: int | None) -> tuple[Status, str]:
    where = f"in the phase {heard.phase!r}"
    if code is None:
        return Status.TIMEOUT, f"the worker hung {where} and was killed at its deadline"
    if code == _NOT_STARTED:
        return Status.ERROR, "the worker did not start"
    if code == -signal.SIGKILL:
        return Status.OOM, f"the worker was killed {where} (SIGKILL: most likely the host's memory ran out)"
    if code < 0:
        return Status.ERROR, f"the worker died {where} ({signal_name(-code)})"
    if heard.rubbish:
        return (
            Status.ERROR,
            f"the worker printed {heard.rubbish} lines that are no answer, and ended with exit {code}",
        )
    return Status.ERROR, f"the worker ended {where} without a result (exit {code})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the worker and whatever it started; where it has ended by itself, what it left behind."""
    if process.returncode is None:  # not reaped: its number, and so its group's, is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
