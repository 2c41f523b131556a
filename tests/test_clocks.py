"""No test may depend on how fast or busy the machine is: what reads a real clock, or waits for it, is named here."""

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
# {file: why it reads a clock}
EXCEPTIONS = {
    "clock.py": "puts the test's own clock in the place of the real one",
    "bench/examine_devices.py": "its process counts processor time (tests.clock.Processor)",
    "bench/measure_cases.py": "its process counts processor time (tests.clock.Processor)",
    "bench/cli/test_interrupt.py": "ends a wait for a process that never comes",
    "bench/worker/checks/test_interconnect.py": "asked_at of a request; ends nothing before twenty sums",
    "bench/launch/test_standby.py": "asked_at of a request",
    "bench/launch/test_worker_process.py": "asked_at of a request; ends a wait for a process that never ends",
    "bench/run/test_suite_run.py": "asked_at of a request",
    "provision/silent_server.py": "ends a read from a test server that stops sending",
    "provision/models/test_pull_hostile.py": "a real clock to which the waits are added that the test skips",
}


def files() -> list[Path]:
    # tests/speed and tests/gpu measure; pytest collects the first only with --benchmark-only, and the second never.
    return [file for file in sorted(TESTS.rglob("*.py")) if not {"speed", "gpu"} & {*file.relative_to(TESTS).parts[:1]}]


def clock_readings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield f"line {node.lineno}: from time import …; write time.…, so that this test sees it"
        is_of_time = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
        if is_of_time and isinstance(node, ast.Attribute) and node.attr in READINGS:
            yield f"line {node.lineno}: time.{node.attr}"


def short_limits(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "timeout" and isinstance(value, int | float) and value < GUARD_SECONDS:
                yield f"line {keyword.value.lineno}: timeout={value:g}, and a slow machine needs longer"


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(TESTS)))
def test_file_reads_no_clock_of_the_machine(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    name = file.relative_to(TESTS).as_posix()
    readings = list(clock_readings(tree))
    assert readings == [] or name in EXCEPTIONS, f"{name}: {readings}. Use a clock of tests/clock.py"
    assert name not in EXCEPTIONS or readings, f"{name} reads no clock any more: take it out of EXCEPTIONS"
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
def test_guard_sees_sleep_clock_and_short_limit(text: str, count: int) -> None:
    tree = ast.parse(text)
    assert len([*clock_readings(tree), *short_limits(tree)]) == count
