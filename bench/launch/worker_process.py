"""The parent of the workers: starts one for each case, waits on its pipe with a deadline, never spins."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench.core import protocol, stats
from bench.core.errors import PARTNER
from bench.core.protocol import Again, Examination, Request, TorchQuery
from bench.core.result import Result, Sample, Status
from bench.core.stats import FEWEST_PAIRS
from bench.core.worker_events import CaseMeasured, TorchDescribed
from bench.launch import pipe, received_events
from bench.launch.monitor import WorkerMonitor
from provision.core import child_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from bench.core.protocol import WorkerRequest
    from bench.core.result import Case
    from bench.core.validation_records import GpuLoadStats

if TYPE_CHECKING:
    OnReceived = Callable[[received_events.ReceivedEvents], None]

_PACKAGE = Path(__file__).resolve().parent.parent
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
_STARVED_SECONDS = 600.0  # so much longer a worker may take that had no core
_MANY_PAIRS = 20  # before so many, the interval of a ratio that jumps between two values is not to be relied on
_MOST_PAIRS = 60
_KNOWN = 0.01
_PRECISIONS = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


def _ignore(_: received_events.ReceivedEvents) -> None:
    """Ignore the events."""


def run_case(request: Request, python: Path, *, hub: Path, on_received: OnReceived = _ignore) -> Result:
    """Run one case in a fresh process.

    A worker that dies, hangs or prints rubbish becomes a result with its status and the end of its stderr;
    the samples that it sent before are kept.

    Args:
        request: what to measure.
        python: the interpreter to measure under.
        hub: the hub cache that the worker may read.
        on_received: called with the events so far, at each line of the worker and twice a second.
    """
    deadline = time.monotonic() + request.limit_seconds + _GRACE_SECONDS
    with Worker(request, python, hub, on_received) as worker:
        worker.listen(deadline)
    return worker.result(request.case)


def run_pair(
    requests: tuple[Request, Request], pythons: tuple[Path, Path], *, hub: Path, on_received: OnReceived = _ignore
) -> tuple[Result, Result]:
    """Run two cases at once whose images are made in turns, never at the same time: what drifts, drifts for both.

    Args:
        requests: what to measure; they are paced. The first one's times hold for both.
        pythons: the interpreter of each.
        hub: the hub cache that the workers may read.
        on_received: called with the events of the worker at work, at each of its lines and twice a second.
    """
    first = requests[0]
    began = time.monotonic()
    ends, limit = began + first.share_seconds, began + first.limit_seconds
    deadline = limit + _GRACE_SECONDS
    one, two = (Worker(each, python, hub, on_received) for each, python in zip(requests, pythons, strict=True))
    both = (one, two)
    with contextlib.ExitStack() as stack:
        ready = []
        for worker in both:
            # One after the other: each prices its case by what the machine can do, and imports and loads undisturbed.
            stack.enter_context(worker)
            ready.append(worker.listen(deadline, worker.is_ready))
            if not ready[-1]:
                break
        while all(ready) and _wants_more(both, ends, limit):
            # A B, then B A: whoever comes first has no better turn than the other.
            for worker in both if len(one.samples) % 2 == 0 else reversed(both):
                ready.append(all(ready) and worker.make_one(deadline))
        for worker in both[: len(ready)]:
            worker.let_go()
            worker.listen(deadline)
    if len(ready) < 2:
        return one.result(requests[0].case), Result(requests[1].case, Status.SKIPPED, reason=PARTNER)
    return one.result(requests[0].case), two.result(requests[1].case)


def query(python: Path, *, seconds: float = 120.0) -> dict[str, Any]:
    """Ask the interpreter's torch what it can compute on; {"error": text} where it cannot say."""
    with Worker(TorchQuery(), python, Path(os.devnull)) as worker:
        worker.listen(time.monotonic() + seconds)
    if isinstance(worker.received.answer, TorchDescribed):
        return worker.received.answer.query
    return {"error": worker.stderr or f"exit {worker.code}"}


def _wants_more(both: tuple[Worker, Worker], ends: float, limit: float) -> bool:
    """Until twenty or more tell their ratio within 1 %, or time is up; not before a few pairs, if they fit."""
    one, two = ([sample.seconds for sample in worker.samples] for worker in both)
    if one and time.monotonic() + one[-1] + two[-1] > limit:
        return False
    if len(one) < FEWEST_PAIRS:
        return True
    if time.monotonic() + one[-1] + two[-1] > ends or len(one) >= _MOST_PAIRS:
        return False
    return len(one) < _MANY_PAIRS or stats.paired_ratio(one, two).spread > _KNOWN


class Worker:
    """A process that measures: started when entered, ended with all that it started when left."""

    def __init__(self, request: WorkerRequest, python: Path, hub: Path, on_received: OnReceived = _ignore) -> None:
        """Take the request, the interpreter, the hub cache that it may read, and a callback for progress."""
        self._on_received = on_received
        self._request, self._python, self._hub = request, python, hub
        self.received = received_events.ReceivedEvents()
        self.code: int | None = received_events.NOT_STARTED
        self.stderr = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._exit = contextlib.ExitStack()
        self._watch: WorkerMonitor | None = None
        self._rest = b""
        self._has_ended = self._is_late = False
        self._waited, self._began = 0.0, time.monotonic()

    @property
    def _is_examination(self) -> bool:
        return isinstance(self._request, Examination)

    @property
    def _is_paced(self) -> bool:
        return isinstance(self._request, Request) and self._request.paced

    @property
    def samples(self) -> list[Sample]:
        """Return the images that the worker has sent."""
        return self.received.samples

    def __enter__(self) -> Self:
        errors = self._exit.enter_context(tempfile.TemporaryFile())
        self._exit.callback(self._end, errors)
        try:
            self._start(errors)
        except BaseException:  # an interrupt above all: what was not entered is not left
            self._exit.close()
            raise
        return self

    def _start(self, errors: IO[bytes]) -> None:
        # An interrupt between the fork and the assignment would leave a process that is never ended.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                worker_command(self._python),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(self._hub),
                start_new_session=True,  # its whole group can be ended, and Ctrl-C reaches it through us alone
            )
            window = "sustained" if self._is_examination else "samples"
            self._watch = WorkerMonitor(self._process.pid, window, is_paired=self._is_paced)
        except OSError as error:
            self._has_ended = True
            self.stderr = f"{self._python} does not start: {error.strerror}"
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        self._send(protocol.encode(self._request))
        if not (self._is_paced or self._is_examination):
            self.let_go()

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _end(self, errors: IO[bytes]) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._process is not None:
            pipe.end(self._process)
            self.let_go()
            self.code = None if self._is_late else self._process.returncode
            self.stderr = pipe.tail(errors)

    def listen(self, deadline: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Read what it says until that is enough (True), it has ended or the deadline has passed (False).

        Blocked, not polling: it looks at the worker twice a second, and at nothing else.
        """
        if self._process is None:
            return False
        if self._has_ended:
            return enough()
        while not enough():
            ends = self._ends(deadline)
            how, self._rest = pipe.listen(self._process, ends, self._rest, self._receive, enough, self._look)
            if how == pipe.LATE and time.monotonic() < self._ends(deadline):
                continue
            if how != pipe.ENOUGH:
                self._has_ended = True
                self._is_late = how == pipe.LATE
                return enough()
        return True

    def _ends(self, deadline: float) -> float:
        """When it is given up: at its deadline, or silent for long; seconds without a core do not count."""
        if self._process is not None:
            self._waited = max(self._waited, pipe.waited_seconds(self._process.pid))
        silent = float("inf") if self._is_examination else self.received.at + self.received.patience
        return min(deadline, silent) + min(self._waited, _STARVED_SECONDS)

    def make_one(self, deadline: float) -> bool:
        """Let a paced worker make one image, and wait for it. Whether it came."""
        count = len(self.samples)
        self._send(protocol.GO)
        return self.listen(deadline, lambda: len(self.samples) > count)

    def is_ready(self) -> bool:
        """Whether a paced worker waits for its word."""
        return self.received.phase == "samples"

    def ask_again(self, phases: Sequence[str], seconds: float) -> None:
        """Let an examining worker ask some phases once more, in that time; what it reads comes beside the first."""
        self.received.phase = "told"
        self._send(Again(tuple(phases), seconds).line)

    def fault(self) -> str:
        """What ended a worker that gave no answer, after it was left."""
        _, reason = received_events.explain_end(self.received, self.code, self._hungry())
        return f"{reason}\n{self.stderr}".strip()

    def gpu(self) -> GpuLoadStats | None:
        """What its card did under the sustained load."""
        return self._watch.gpu() if self._watch is not None else None

    def stop(self) -> None:
        """End it from another thread than the one that listens to it, and learns of it so."""
        if self._process is not None:
            pipe.kill(self._process)

    def let_go(self) -> None:
        """Nothing more is told: a paced worker makes no further image."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def result(self, case: Case) -> Result:
        """What became of the case, after the worker was left."""
        result = self._result(case)
        return self._watch.add_to(result) if self._watch is not None else result

    def _result(self, case: Case) -> Result:
        if isinstance(self.received.answer, CaseMeasured):
            return self.received.answer.result
        status, reason = received_events.explain_end(self.received, self.code, self._hungry())
        return Result(
            case,
            status,
            reason=f"{reason}\n{self.stderr}".strip(),
            phases=self.received.phases,
            samples=tuple(self.received.samples),
            work=self.received.work,
        )

    def _hungry(self) -> float:
        """The share of its life in which it was ready and had no core."""
        return self._waited / max(time.monotonic() - self._began, 1e-9)

    def _send(self, line: str) -> None:
        self.received.at = time.monotonic()  # until now the worker had no reason to send a line
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()

    def _receive(self, line: bytes) -> None:
        received_events.receive(self.received, self._watch, line)
        self._on_received(self.received)

    def _look(self) -> None:
        if self._watch is not None:
            self._watch.look()
        self._on_received(self.received)


def worker_command(python: Path) -> Sequence[str]:
    """How a worker is started; tests put their own program here."""
    return [str(python), "-c", _LAUNCH, str(_PACKAGE), "bench.worker"]


def _environment(hub: Path) -> dict[str, str]:
    # The measured interpreter finds its own packages alone, no warning of theirs is an error, and it writes bytecode:
    # compiled bytecode makes the second case start in a third of the time.
    environment = child_environment.child(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
    # The case sets the precision of fp32; these variables would change it.
    for name in _PRECISIONS:
        environment.pop(name, None)
    return environment
