"""Starts the real command and the real worker with clocks that no other process can hurry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bench import runner

if TYPE_CHECKING:
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


def command(*words: object) -> list[str]:
    """Return the command line of `bench` whose own clock and whose workers' clocks count processor time."""
    return [sys.executable, "-c", COMMAND, *map(str, words)]


def worker_command(python: Path) -> list[str]:
    """Start the real worker; its clocks count processor time. It stands in for `runner.worker_command`."""
    return [str(python), "-c", _PROCESSOR_TIME + runner._LAUNCH, str(runner._PACKAGE), "bench.worker"]
