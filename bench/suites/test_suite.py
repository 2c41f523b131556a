"""Measure each case of a suite as a test, in a worker process, and pass its samples to pytest-benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bench.core.result import Status
from bench.pytest_plugin import Replay, suites
from bench.report import export
from bench.run import disturbance, judge_cases
from provision.core.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.pytest_plugin import Suites
    from bench.run.cases import Cell

CLOCK = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create one test per case."""
    cells = suites(metafunc.config).cells
    metafunc.parametrize("cell", cells, ids=[cell.case.name for cell in cells])


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[Suites]:
    """Yield the suite that measures the cases; store the run after the last case."""
    measured_suite = suites(pytestconfig)
    # A case that pytest does not run (it was deselected) gets no share of the time.
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = {function.name for function in functions if "suite" in function.fixturenames}
    measured_suite.cells = [cell for cell in measured_suite.cells if f"test_case[{cell.case.name}]" in names]
    yield measured_suite
    measured_suite.keep()


@pytest.mark.benchmark(timer=CLOCK)
def test_case(cell: Cell, suite: Suites, benchmark: Any) -> None:
    """Measure one case.

    The test fails where the verdict of `bench run` would not pass, and is skipped if the case cannot run here.
    """
    benchmark.group = cell.case.model
    try:
        result = suite.measure(cell)
    except FirstlightError as error:
        pytest.fail(str(error), pytrace=False)
    if judge_cases.is_unmeasured(result):
        pytest.fail(str(result.reason), pytrace=False)
    if result.status is not Status.OK and not judge_cases.is_wrong(result):
        pytest.skip(result.cause)
    if result.samples:
        CLOCK.wind([sample.seconds for sample in result.samples])
        benchmark.pedantic(CLOCK.tick, rounds=len(result.samples))
        benchmark.extra_info.update(export.extra_info(result))
    disturbed = disturbance.of_case(result)
    if disturbed:
        benchmark.extra_info["disturbed"] = disturbed
    if result.status is not Status.OK:
        pytest.fail(str(result.reason), pytrace=False)
