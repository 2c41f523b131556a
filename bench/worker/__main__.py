"""Runs a worker process: it reads requests from stdin, and writes events as lines of JSON to stdout."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from functools import partial
from typing import IO, TYPE_CHECKING

from bench.core import worker_events, worker_requests
from bench.core.worker_events import CaseMeasured, TorchDescribed
from bench.core.worker_requests import CaseRequest, Examination, LinkTest, PrecisionQuery, Preparation, TorchQuery
from bench.worker import device_probe, libraries
from bench.worker.checks import interconnect, run
from bench.worker.measurement import measure

if TYPE_CHECKING:
    from bench.core.worker_events import WorkerEvent

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main() -> int:
    """Read a request from stdin, and after a Preparation a second one; write the events to stdout.

    Only events go to the real stdout; all other output of this process to stdout goes to stderr.
    """
    events_file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _end_with_parent()
    emit = partial(_write, events_file)
    request, imports_seconds = worker_requests.decode(sys.stdin.readline()), 0.0
    if isinstance(request, Preparation):
        imports_seconds = libraries.prepare(emit)
        request = worker_requests.decode(sys.stdin.readline())
    match request:
        case TorchQuery():
            import torch

            emit(TorchDescribed(device_probe.query(torch)))
        case PrecisionQuery():
            import torch

            device_probe.precisions(torch, request, emit)
        case Examination():
            run.examine(request, emit, sys.stdin)
        case LinkTest():
            interconnect.run(request, emit)
        case CaseRequest():
            emit(CaseMeasured(measure(request, emit, imports_seconds=imports_seconds)))
    return 0


def _end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends for any reason (Linux only)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        sys.exit(1)


def _write(events_file: IO[str], event: WorkerEvent) -> None:
    events_file.write(worker_events.encode(event) + "\n")
    events_file.flush()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # All events are written. A library that crashes at the exit of Python must not change the exit code.
    os._exit(code)
