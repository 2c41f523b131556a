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
from typing import TYPE_CHECKING, Any

from bench.result import Phases, Result, Sample, Status, plain, record
from provision.command import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.worker import Request

_CHECKOUT = Path(__file__).resolve().parent.parent
_GRACE_SECONDS = 20.0
_TAIL_LINES = 8


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
    tail = redact("\n".join(stderr.strip().splitlines()[-_TAIL_LINES:]))
    return Result(
        request.case,
        status,
        reason=f"{reason}\n{tail}".strip(),
        phases=heard.phases,
        samples=tuple(heard.samples),
    )


def query(python: Path, *, seconds: float = 120.0) -> dict[str, Any]:
    """Ask the interpreter's torch what it can compute on; {"error": text} where it cannot say."""
    heard, code, stderr = _talk({"query": True}, python, Path(os.devnull), time.monotonic() + seconds)
    if heard.answer is not None and isinstance(heard.answer.get("query"), dict):
        return dict(heard.answer["query"])
    return {"error": redact("\n".join(stderr.strip().splitlines()[-_TAIL_LINES:])) or f"exit {code}"}


def worker_command(python: Path) -> Sequence[str]:
    """How a worker is started; tests put their own program here."""
    return [str(python), "-m", "bench.worker"]


def _talk(request: dict[str, Any], python: Path, hub: Path, deadline: float) -> tuple[_Heard, int | None, str]:
    """Start a worker, hand it its request, listen until it ends. The code is None when it was stopped for time."""
    environment = dict(os.environ)
    environment |= {
        "PYTHONPATH": str(_CHECKOUT),
        "PYTHONNOUSERSITE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(hub),
    }
    # Compiled bytecode is what makes the second case start in a third of the time.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
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
            return heard, -1, f"{python} does not start: {error.strerror}"
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            with contextlib.suppress(BrokenPipeError), process.stdin:  # type: ignore[union-attr]  # it is a pipe
                process.stdin.write(json.dumps(request).encode())  # type: ignore[union-attr]
            ended = _listen(process, deadline, lambda line: _hear(heard, line))
            code = process.wait() if ended else None
        finally:
            _end(process)
        errors.seek(0)
        return heard, code, errors.read().decode("utf-8", "replace")


def _listen(process: subprocess.Popen[bytes], deadline: float, hear: Callable[[bytes], None]) -> bool:
    """Read whole lines until the pipe closes (True) or the deadline passes (False); blocked, not polling."""
    assert process.stdout is not None  # noqa: S101 (opened as a pipe)
    rest = b""
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not ready.select(left):
                return False
            block = os.read(process.stdout.fileno(), 1 << 16)
            if not block:
                break
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                hear(line)
    try:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _hear(heard: _Heard, line: bytes) -> None:
    try:
        event = json.loads(line)
        if "phase" in event:
            heard.phase = str(event["phase"])
        elif "phases" in event:
            heard.phases = record(event["phases"], Phases, "phases")
        elif "sample" in event:
            heard.samples.append(record(event["sample"], Sample, "sample"))
        else:
            heard.answer = event if isinstance(event, dict) else None
    except (ValueError, TypeError):
        heard.rubbish += 1


def _autopsy(heard: _Heard, code: int | None) -> tuple[Status, str]:
    where = f"in the phase {heard.phase!r}"
    if code is None:
        return Status.TIMEOUT, f"the worker hung {where} and was killed at its deadline"
    if code == -signal.SIGKILL:
        return Status.OOM, f"the worker was killed {where} (SIGKILL: most likely the host's memory ran out)"
    if code < 0:
        return Status.ERROR, f"the worker died {where} ({signal.Signals(-code).name})"
    if heard.rubbish:
        return (
            Status.ERROR,
            f"the worker printed {heard.rubbish} lines that are no answer, and ended with exit {code}",
        )
    return Status.ERROR, f"the worker ended {where} without a result (exit {code})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the worker and whatever it started; harmless when it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
