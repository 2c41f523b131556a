"""Starts the real `bench` and its real worker with clocks that count their CPU time instead of real time."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bench.launch import worker_process

if TYPE_CHECKING:
    from pathlib import Path

# Replaces the clocks of a process by the CPU time that the process has used, so that other processes do not use up its
# budget. The modules that need the real clock to wait, threading and subprocess, are imported before.
_PROCESSOR_TIME = """
import subprocess, sys, threading, time
time.monotonic = time.perf_counter = time.process_time
time.time = lambda: 1e9 + time.process_time()
"""
# Makes such a worker measure no host load, and take only as many samples as a median needs. test_timing.py and
# test_suite_run.py test that noise leads to more samples.
_FEW = """
from bench.worker import host_load, timing
host_load._cpu_ticks = host_load._pressure_seconds = host_load._waited_seconds = lambda: None
timing.MAX_SAMPLES = timing.ENOUGH_SAMPLES
"""
# The process that starts such a worker. Its time.time is constant, so that `asked_at` of a request is the time at which
# the worker's clock begins.
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
    """Return the command line of `bench` with these arguments; its clock and its workers' clocks count CPU time."""
    return [sys.executable, "-c", COMMAND, *map(str, words)]


def worker_command(python: Path) -> list[str]:
    """Return the command line of the real worker with such clocks; replaces `worker_process.worker_command`."""
    find, run, rest = worker_process._BOOTSTRAP.partition("runpy.run_module")
    return [
        str(python),
        "-c",
        f"{_PROCESSOR_TIME}{find}{_FEW}{run}{rest}",
        str(worker_process._PACKAGE),
        "bench.worker",
    ]
