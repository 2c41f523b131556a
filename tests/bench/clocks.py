"""Clocks that a test owns: no budget, deadline or rate of a test depends on how fast or busy the machine is."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING

from bench import runner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The clocks of a process count the processor time that it has used, so other processes take nothing of its budget.
# Threads and subprocesses are imported first: they wait by the real clock.
_PROCESSOR_TIME = """
import subprocess, sys, threading, time
time.monotonic = time.perf_counter = time.process_time
time.time = lambda: 1e9 + time.process_time()
"""
# The parent of such a worker. `asked_at` of a request is the moment at which the worker's clock begins.
_PARENT = f"""{_PROCESSOR_TIME}
time.time = lambda: 1e9
from bench import runner
from tests.bench import clocks
runner.worker_command = clocks.worker_command
"""
COMMAND = f"""{_PARENT}
from bench.cli import main
main()
"""
PYTEST = f"""
import pytest
{_PARENT}
sys.exit(pytest.main(sys.argv[1:]))
"""


class Standing:
    """Stands in for the module `time`: no time passes but what the test adds to `now`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.time = time.time

    def monotonic(self) -> float:
        return self.now


class Ticking(Standing):
    """Stands in for the module `time`: each reading of the clock adds a step."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self._step = step

    def monotonic(self) -> float:
        self.now += self._step
        return self.now


class Until:
    """Stands in for the module `time`: no time passes until a condition holds, then every deadline has passed.

    A few more readings of the clock come first, so that what was written until then is read.
    """

    _READINGS = 8

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition
        self._left = self._READINGS

    def monotonic(self) -> float:
        if self._left < self._READINGS or self._condition():
            self._left -= 1
        return 0.0 if self._left > 0 else math.inf


def command(*words: object) -> list[str]:
    """Return the command line of `bench` whose own clock and whose workers' clocks count processor time."""
    return [sys.executable, "-c", COMMAND, *map(str, words)]


def worker_command(python: Path) -> list[str]:
    """Start the real worker; its clocks count processor time. It stands in for `runner.worker_command`."""
    return [str(python), "-c", _PROCESSOR_TIME + runner._LAUNCH, str(runner._PACKAGE), "bench.worker"]
