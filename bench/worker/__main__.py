"""The worker process of one case: reads a request on stdin, answers in JSON lines on its stdout."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import IO, Any

from bench.core.codec import dumps, plain, record
from bench.core.protocol import Request
from bench.worker import device_probe
from bench.worker.checks import interconnect, run
from bench.worker.measurement import measure

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main() -> int:
    """Read one request from stdin, answer on the real stdout, keep every print of a library off it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _end_with_the_parent()
    raw = json.loads(sys.stdin.readline())
    if raw == {"query": True}:
        import torch

        _say(answers, {"query": device_probe.query(torch)})
        return 0
    if "precisions" in raw:
        import torch

        device_probe.precisions(
            torch, raw["precisions"], raw["dtypes"], raw["cpus"], lambda event: _say(answers, event)
        )
        return 0
    if "examine" in raw:
        run.main(raw["examine"], lambda event: _say(answers, event), sys.stdin)
        return 0
    if "links" in raw:
        interconnect.main(raw["links"], lambda event: _say(answers, event))
        return 0
    request: Request = record(raw, Request, "request")
    result = measure(request, lambda event: _say(answers, event))
    _say(answers, {"result": plain(result)})
    return 0


def _end_with_the_parent() -> None:
    """Let the kernel end this process when the parent has ended, however that ended (Linux alone can do so)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        sys.exit(1)


def _say(answers: IO[str], event: dict[str, Any]) -> None:
    answers.write(dumps(event) + "\n")
    answers.flush()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Nothing is left to do, and a library's teardown must not turn a good result into a crash.
    os._exit(code)
