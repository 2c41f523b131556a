"""Every case of a suite as a test: measured in a fresh process, told to pytest-benchmark image by image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bench import export, verdict
from bench.pytest_plugin import Replay, suites
from bench.result import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.cases import Cell
    from bench.pytest_plugin import Suites

CLOCK = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test a case."""
    cells = suites(metafunc.config).cells
    metafunc.parametrize("cell", cells, ids=[cell.case.name for cell in cells])


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Iterator[Suites]:
    """What measures; the run is kept when the last case has been measured."""
    chosen = suites(pytestconfig)
    yield chosen
    chosen.keep()


@pytest.mark.benchmark(timer=CLOCK)
def test_case(cell: Cell, suite: Suites, benchmark: Any) -> None:
    """A case fails where `bench run` would fail; what cannot run here is skipped with its reason."""
    benchmark.group = cell.case.model
    result = suite.measure(cell)
    if result.status is Status.SKIPPED:
        pytest.skip(result.cause)
    if result.samples:
        CLOCK.wind([sample.seconds for sample in result.samples])
        benchmark.pedantic(CLOCK.tick, rounds=len(result.samples))
        benchmark.extra_info.update(export.extra_info(result))
    disturbed = verdict.contended(result)
    if disturbed:
        benchmark.extra_info["disturbed"] = disturbed
    if result.status is not Status.OK:
        pytest.fail(str(result.reason), pytrace=False)
