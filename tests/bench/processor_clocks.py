"""Start the real command and the real worker with clocks that count processor time, which other work cannot change."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bench.launch import worker_process

if TYPE_CHECKING:
    from pathlib import Path

# The clocks of a process count the processor time that it has used, so other processes take nothing of its budget.
# Threads and subprocesses are imported first, since they have to wait by the real clock.
_PROCESSOR_TIME = """
import subprocess, sys, threading, time
time.monotonic = time.perf_counter = time.process_time
time.time = lambda: 1e9 + time.process_time()
"""
# Such a worker measures no host load and takes the fewest samples that give a median. test_timing.py and
# test_suite_run.py test how noise adds samples.
_FEW = """
from bench.worker import host_load, timing
host_load._cpu_ticks = host_load._pressure_seconds = host_load._waited_seconds = lambda: None
timing.MAX_SAMPLES = timing.ENOUGH_SAMPLES
"""
# The parent of such a worker. `asked_at` of a request is the time at which the worker's clock begins.
_PARENT = f"""{_PROCESSOR_TIME}
time.time = lambda: 1e9
from bench.launch import worker_process as runner; from bench.run import disturbance
from tests.bench import processor_clocks
runner.worker_command = processor_clocks.worker_command
disturbance.of_case = lambda _: None  # no case is measured twice
"""
COMMAND = f"""{_PARENT}
from bench.cli.main import main
main()
"""
PYTEST = f"""
import pytest
{_PARENT}
sys.exit(pytest.main(sys.argv[1:]))
"""


def command(*words: object) -> list[str]:
    """Return the command line of `bench`, whose clock and whose workers' clocks count processor time."""
    return [sys.executable, "-c", COMMAND, *map(str, words)]


def worker_command(python: Path) -> list[str]:
    """Start the real worker; its clocks count processor time. It stands in for `worker_process.worker_command`."""
    find, run, rest = worker_process._BOOTSTRAP.partition("runpy.run_module")
    return [
        str(python),
        "-c",
        f"{_PROCESSOR_TIME}{find}{_FEW}{run}{rest}",
        str(worker_process._PACKAGE),
        "bench.worker",
    ]
