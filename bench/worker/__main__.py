"""The worker process of one case: reads a request on stdin, answers in JSON lines on its stdout."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from functools import partial
from typing import IO, TYPE_CHECKING

from bench.core import protocol, worker_events
from bench.core.protocol import Examination, Linking, PrecisionQuery, Request, TorchQuery
from bench.core.worker_events import CaseMeasured, TorchDescribed
from bench.worker import device_probe
from bench.worker.checks import interconnect, run
from bench.worker.measurement import measure

if TYPE_CHECKING:
    from bench.core.worker_events import WorkerEvent

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main() -> int:
    """Read one request from stdin, answer on the real stdout, keep every print of a library off it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _end_with_the_parent()
    emit = partial(_write, answers)
    match request := protocol.decode(sys.stdin.readline()):
        case TorchQuery():
            import torch

            emit(TorchDescribed(device_probe.query(torch)))
        case PrecisionQuery():
            import torch

            device_probe.precisions(torch, request, emit)
        case Examination():
            run.examine(request, emit, sys.stdin)
        case Linking():
            interconnect.run(request, emit)
        case Request():
            emit(CaseMeasured(measure(request, emit)))
    return 0


def _end_with_the_parent() -> None:
    """Let the kernel end this process when the parent has ended, however that ended (Linux alone can do so)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        sys.exit(1)


def _write(answers: IO[str], event: WorkerEvent) -> None:
    answers.write(worker_events.encode(event) + "\n")
    answers.flush()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Nothing is left to do, and a library's teardown must not turn a good result into a crash.
    os._exit(code)
