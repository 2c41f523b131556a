"""No test may depend on how fast or busy the machine is.

So no file of `tests` reads a real clock, sleeps, or sets a short timeout, except those that EXCEPTIONS lists.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.clock import GUARD_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).resolve().parent
READINGS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep"}
# {file: why it reads a clock}. `asked_at` of a worker request is a time of the real clock.
EXCEPTIONS = {
    "clock.py": "defines the clocks that replace the real one",
    "bench/examine_devices.py": "replaces the clocks of its own process by CPU time (tests.clock.Processor)",
    "bench/measure_cases.py": "replaces the clocks of its own process by CPU time (tests.clock.Processor)",
    "bench/cli/test_interrupt.py": "ends the wait for a child process that fails to start",
    "bench/worker/checks/test_interconnect.py": "sets the field asked_at; its limit ends no sum before the twentieth",
    "bench/launch/test_standby.py": "sets the field asked_at",
    "bench/launch/test_worker_process.py": "sets the field asked_at; ends the wait for a process that hangs",
    "bench/run/test_suite_run.py": "sets the field asked_at",
    "provision/silent_server.py": "ends a read from a test server that sends nothing",
    "provision/models/test_pull_hostile.py": "its clock adds the skipped waits to the real time",
}


def files() -> list[Path]:
    # tests/speed and tests/gpu measure real time. `make test` runs neither.
    return [file for file in sorted(TESTS.rglob("*.py")) if not {"speed", "gpu"} & {*file.relative_to(TESTS).parts[:1]}]


def clock_readings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield f"line {node.lineno}: from time import …; write time.NAME, which this test can find"
        is_of_time = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
        if is_of_time and isinstance(node, ast.Attribute) and node.attr in READINGS:
            yield f"line {node.lineno}: time.{node.attr}"


def short_limits(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "timeout" and isinstance(value, int | float) and value < GUARD_SECONDS:
                yield f"line {keyword.value.lineno}: timeout={value:g} is too short; use GUARD_SECONDS"


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(TESTS)))
def test_file_reads_no_real_clock_and_sets_no_short_timeout(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    name = file.relative_to(TESTS).as_posix()
    readings = list(clock_readings(tree))
    assert readings == [] or name in EXCEPTIONS, f"{name}: {readings}. Use a clock of tests/clock.py"
    assert name not in EXCEPTIONS or readings, f"{name} reads no clock any more: remove it from EXCEPTIONS"
    assert list(short_limits(tree)) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import time\ntime.sleep(1)", 1),
        ("from time import monotonic", 1),
        ("import time\nassert time.perf_counter() - began < 2", 1),
        ("process.wait(timeout=30)", 1),
        ("process.wait(timeout=600)", 0),
        ("clock.monotonic()", 0),
    ],
)
def test_sleep_real_clock_and_short_timeout_are_found(text: str, count: int) -> None:
    tree = ast.parse(text)
    assert len([*clock_readings(tree), *short_limits(tree)]) == count
