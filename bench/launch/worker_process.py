"""Starts one worker process per case, reads its events until a deadline without busy waiting, and ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench.core import stats, worker_requests
from bench.core.errors import PARTNER
from bench.core.result import Result, Sample, Status
from bench.core.stats import FEWEST_PAIRS
from bench.core.worker_events import CaseMeasured, TorchDescribed
from bench.core.worker_requests import WAITING, CaseRequest, Examination, Preparation, RepeatPhases, TorchQuery
from bench.launch import child_process, received_events
from bench.launch.monitor import WorkerMonitor
from provision.core import child_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from bench.core.result import Case
    from bench.core.validation_records import GpuLoadStats
    from bench.core.worker_requests import WorkerRequest

if TYPE_CHECKING:
    OnReceived = Callable[[received_events.ReceivedEvents], None]

_PACKAGE = Path(__file__).resolve().parent.parent
# A worker imports the package `bench` from argv[1], and all else from the measured environment. It must not import from
# the working folder or from firstlight's own environment, in which `bench` may be installed.
_BOOTSTRAP = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]  # no module of the working folder takes the place of another
import runpy, types
sys.modules["bench"] = types.ModuleType("bench")
sys.modules["bench"].__path__ = [sys.argv[1]]
runpy.run_module(sys.argv[2], run_name="__main__", alter_sys=True)
"""
_GRACE_SECONDS = 20.0
_STARVED_SECONDS = 600.0  # the time in which a worker waited for a core extends its deadline by at most this
_MANY_PAIRS = 20  # with fewer pairs, the interval is not reliable if the ratio jumps between two values
_MAX_PAIRS = 60
_PRECISE_SPREAD = 0.01
_PRECISION_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


def _ignore(_: received_events.ReceivedEvents) -> None:
    """Do nothing with the events."""


def run_case(
    request: CaseRequest, python: Path, *, hub: Path, on_received: OnReceived = _ignore, prepared: Worker | None = None
) -> Result:
    """Measure one case in a worker process.

    A worker that dies, hangs or prints invalid lines gives a result with a status that is not ok. Its reason ends with
    the last lines of the worker's stderr, and the samples that were sent before are kept.

    Args:
        request: the case to measure.
        python: the interpreter of the worker.
        hub: the Hugging Face cache folder that the worker may read.
        on_received: called with all events so far, after each line of the worker and twice a second.
        prepared: a prepared worker that takes the case; None starts a new one.
    """
    deadline = time.monotonic() + request.limit_seconds + _GRACE_SECONDS
    with _worker_for(request, python, hub, on_received, prepared) as worker:
        worker.listen(deadline)
    return worker.result(request.case)


def _worker_for(
    request: CaseRequest, python: Path, hub: Path, on_received: OnReceived, prepared: Worker | None
) -> Worker:
    if prepared is None:
        return Worker(request, python, hub, on_received)
    prepared.assign(request, on_received)
    return prepared


def run_pair(
    requests: tuple[CaseRequest, CaseRequest],
    pythons: tuple[Path, Path],
    *,
    hub: Path,
    on_received: OnReceived = _ignore,
    prepared: tuple[Worker | None, Worker | None] = (None, None),
) -> tuple[Result, Result]:
    """Measure two cases in two processes that generate their images in turns, never at the same time.

    A slow change of the machine's speed then affects both cases alike.

    Args:
        requests: the cases to measure; both are paced. The time limits of the first one apply to both.
        pythons: the interpreter of each case.
        hub: the Hugging Face cache folder that the workers may read.
        on_received: called with all events of one worker, after each of its lines and twice a second while it computes.
        prepared: a prepared worker for each case; None starts a new one.
    """
    first = requests[0]
    began = time.monotonic()
    ends, limit = began + first.share_seconds, began + first.limit_seconds
    deadline = limit + _GRACE_SECONDS
    both: list[Worker] = []
    with contextlib.ExitStack() as stack:
        for worker in prepared:
            if worker is not None:
                stack.push(worker)
        ready = []
        for request, python, waiting in zip(requests, pythons, prepared, strict=True):
            # The second worker starts when the first one is ready, so the two do not disturb each other's preparation.
            both.append(stack.enter_context(_worker_for(request, python, hub, on_received, waiting)))
            ready.append(both[-1].listen(deadline, both[-1].is_ready))
            if not ready[-1]:
                break
        while all(ready) and _needs_pair(both, ends, limit):
            # The order alternates (A B, then B A), so neither case is always the first of a pair.
            for worker in both if len(both[0].samples) % 2 == 0 else reversed(both):
                ready.append(all(ready) and worker.request_image(deadline))
        for worker in both:
            worker.close_stdin()
            worker.listen(deadline)
    one = both[0].result(requests[0].case)
    if len(both) < 2:
        return one, Result(requests[1].case, Status.SKIPPED, reason=PARTNER)
    return one, both[1].result(requests[1].case)


def query(python: Path, *, seconds: float = 120.0) -> dict[str, Any]:
    """Return torch's version and devices under an interpreter; {"error": text} if torch does not start.

    `seconds`: the time limit. `device_probe.query` describes the dict.
    """
    with Worker(TorchQuery(), python, Path(os.devnull)) as worker:
        worker.listen(time.monotonic() + seconds)
    if isinstance(worker.received.answer, TorchDescribed):
        return worker.received.answer.query
    return {"error": worker.stderr or f"exit {worker.code}"}


def _needs_pair(both: Sequence[Worker], ends: float, limit: float) -> bool:
    """Return whether the two workers of a pair have to make another pair of images.

    They need FEWEST_PAIRS pairs, unless the next pair would end after `limit`. They need more until 20 pairs give the
    ratio to within 1 %, the next pair would end after `ends`, or there are 60 pairs.
    """
    one, two = ([sample.seconds for sample in worker.samples] for worker in both)
    if one and time.monotonic() + one[-1] + two[-1] > limit:
        return False
    if len(one) < FEWEST_PAIRS:
        return True
    if time.monotonic() + one[-1] + two[-1] > ends or len(one) >= _MAX_PAIRS:
        return False
    return len(one) < _MANY_PAIRS or stats.paired_ratio(one, two).spread > _PRECISE_SPREAD


class Worker:
    """Manage a worker process as a context manager.

    Entering starts the process; leaving ends it with all its children.
    """

    def __init__(self, request: WorkerRequest, python: Path, hub: Path, on_received: OnReceived = _ignore) -> None:
        """Prepare to start a worker process.

        Args:
            request: the first request to send.
            python: the interpreter of the process.
            hub: the Hugging Face cache folder that the worker may read.
            on_received: called with all events so far, after each line of the worker and twice a second.
        """
        self._on_received = on_received
        self._request, self._python, self._hub = request, python, hub
        self.received = received_events.ReceivedEvents()
        self.code: int | None = received_events.NOT_STARTED
        self.stderr = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._exit = contextlib.ExitStack()
        self._monitor: WorkerMonitor | None = None
        self._rest = b""
        self._has_ended = self._is_late = self._is_started = False
        self._waited, self._began = 0.0, time.monotonic()

    @property
    def _is_examination(self) -> bool:
        return isinstance(self._request, Examination)

    @property
    def _is_paced(self) -> bool:
        return isinstance(self._request, CaseRequest) and self._request.paced

    @property
    def samples(self) -> list[Sample]:
        """Return the samples that the worker has sent."""
        return self.received.samples

    def __enter__(self) -> Self:
        if self._is_started:
            return self
        self._is_started = True
        errors = self._exit.enter_context(tempfile.TemporaryFile())
        self._exit.callback(self._end, errors)
        try:
            self._start(errors)
        except BaseException:  # mainly an interrupt: Python calls no __exit__ after a failed __enter__
            self._exit.close()
            raise
        return self

    def _start(self, errors: IO[bytes]) -> None:
        # An interrupt between the fork and the assignment would leave a process that nothing ends.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                worker_command(self._python),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(self._hub),
                start_new_session=True,  # so its whole group can be killed, and Ctrl-C does not reach it directly
            )
            window = "sustained" if self._is_examination else "samples"
            self._monitor = WorkerMonitor(self._process.pid, window, is_paired=self._is_paced)
        except OSError as error:
            self._has_ended = True
            self.stderr = f"{self._python} does not start: {error.strerror}"
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        self._send(worker_requests.encode(self._request))
        self._close_stdin_after_request()

    def assign(self, request: CaseRequest, on_received: OnReceived) -> None:
        """Send a prepared worker the request of a case.

        From then on it is like a worker that was started for this request.
        """
        self._request, self._on_received = request, on_received
        self.received = received_events.ReceivedEvents()
        if self._monitor is not None and self._process is not None:
            self._monitor.close()
            self._monitor = WorkerMonitor(self._process.pid, is_paired=self._is_paced)
        self._send(worker_requests.encode(request))
        self._close_stdin_after_request()

    def _close_stdin_after_request(self) -> None:
        if not (self._is_paced or isinstance(self._request, (Examination, Preparation))):
            self.close_stdin()

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _end(self, errors: IO[bytes]) -> None:
        if self._monitor is not None:
            self._monitor.close()
        if self._process is not None:
            child_process.end(self._process)
            self.close_stdin()
            self.code = None if self._is_late else self._process.returncode
            self.stderr = child_process.tail(errors)

    def listen(self, deadline: float, is_done: Callable[[], bool] = lambda: False) -> bool:
        """Read the worker's lines until `is_done()` is true, then return True.

        Return False if the worker ends or its deadline passes before that. The call blocks, and polls the worker's
        monitor twice a second.
        """
        if self._process is None:
            return False
        if self._has_ended:
            return is_done()
        while not is_done():
            ends = self._ends(deadline)
            reason, self._rest = child_process.listen(
                self._process, ends, self._rest, self._receive, is_done, self._poll
            )
            if reason == child_process.LATE and time.monotonic() < self._ends(deadline):
                continue
            if reason != child_process.DONE:
                self._has_ended = True
                self._is_late = reason == child_process.LATE
                return is_done()
        return True

    def _ends(self, deadline: float) -> float:
        """Return the time (time.monotonic) at which the worker is killed: its deadline, or the limit of its silence.

        The time in which the worker waited for a core is added to either.
        """
        if self._process is not None:
            self._waited = max(self._waited, child_process.waited_seconds(self._process.pid))
        silent = float("inf") if self._is_examination else self.received.at + self.received.silence_limit_seconds
        return min(deadline, silent) + min(self._waited, _STARVED_SECONDS)

    def request_image(self, deadline: float) -> bool:
        """Request one image from a worker with a paced request; return whether it was made before the deadline."""
        count = len(self.samples)
        self._send(worker_requests.GO)
        return self.listen(deadline, lambda: len(self.samples) > count)

    def is_prepared(self) -> bool:
        """Return whether the worker has imported its libraries and waits for a request."""
        return self.received.phase == WAITING

    def is_ready(self) -> bool:
        """Return whether a worker with a paced request waits for the control line of its next image."""
        return self.received.phase == "samples"

    def request_again(self, phases: Sequence[str], seconds: float) -> None:
        """Send a control line, upon which an examining worker repeats some phases within `seconds`.

        The new readings are appended to those of the first time.
        """
        self.received.phase = "repeat"
        self._send(RepeatPhases(tuple(phases), seconds).line)

    def fault(self) -> str:
        """Return the reason for which the worker sent no answer, and the end of its stderr.

        Call it after leaving the context.
        """
        _, reason = received_events.explain_end(self.received, self.code, self._starved_share())
        return f"{reason}\n{self.stderr}".strip()

    def gpu(self) -> GpuLoadStats | None:
        """Return the GPU's clocks, power and throttling under sustained load; None if the GPU could not be read."""
        return self._monitor.gpu() if self._monitor is not None else None

    def stop(self) -> None:
        """Kill the worker; another thread that listens to it then sees its end."""
        if self._process is not None:
            child_process.kill(self._process)

    def close_stdin(self) -> None:
        """Close the worker's stdin, upon which a worker with a paced request makes no further image."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def result(self, case: Case) -> Result:
        """Return the result of the case; call it after leaving the context."""
        result = self._result(case)
        return self._monitor.add_to(result) if self._monitor is not None else result

    def _result(self, case: Case) -> Result:
        if isinstance(self.received.answer, CaseMeasured):
            return self.received.answer.result
        status, reason = received_events.explain_end(self.received, self.code, self._starved_share())
        return Result(
            case,
            status,
            reason=f"{reason}\n{self.stderr}".strip(),
            phases=self.received.phases,
            samples=tuple(self.received.samples),
            work=self.received.work,
        )

    def _starved_share(self) -> float:
        """Return the share of the worker's lifetime in which it was ready to run and waited for a core."""
        return self._waited / max(time.monotonic() - self._began, 1e-9)

    def _send(self, line: str) -> None:
        self.received.at = time.monotonic()  # the silence before this line is no sign of a hung worker
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()

    def _receive(self, line: bytes) -> None:
        received_events.receive(self.received, self._monitor, line)
        self._on_received(self.received)

    def _poll(self) -> None:
        if self._monitor is not None:
            self._monitor.poll()
        self._on_received(self.received)


def worker_command(python: Path) -> Sequence[str]:
    """Return the command line that starts a worker process; tests replace this function."""
    return [str(python), "-c", _BOOTSTRAP, str(_PACKAGE), "bench.worker"]


def _environment(hub: Path) -> dict[str, str]:
    # `child` removes variables that add packages, turn warnings into errors, or forbid cached bytecode. With cached
    # bytecode the second case starts in a third of the time.
    environment = child_environment.child(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
    # The dtype of the case sets how torch computes in fp32; these variables would override that.
    for name in _PRECISION_VARIABLES:
        environment.pop(name, None)
    return environment
