"""The session of a run by a clock that stands still: who gets how much of the budget, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.core.protocol import Request
from bench.core.result import Phases, Result, Sample, Status
from bench.launch import worker_process
from bench.run import session, store, suite_run
from bench.run.cases import Cell
from tests.bench.conftest import a_case, a_host, a_result
from tests.bench.fake_workers import Quiet
from tests.bench.run.test_suite_run import wish_in
from tests.clock import Standing

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def progress() -> Quiet:
    return Quiet()


def test_without_time_nothing_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: Quiet
) -> None:
    monkeypatch.setattr(worker_process, "run_case", lambda *_, **__: pytest.fail("there is no time"))
    run_request = wish_in(tmp_path, 60.0)
    begun = session.Session(run_request, suite_run.find_bench(run_request), 60.0, progress)
    disturbed = a_result(host=replace(a_host(), wait_share=0.4))
    assert begun.measure_again(Cell(a_case(), find_max=False), disturbed, 61.0, "") is disturbed


@pytest.mark.parametrize(("waited", "later"), [(0.4, 6.0), (0.0, 55.0)])
def test_only_an_undisturbed_start_makes_later_ones_dear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: Quiet, waited: float, later: float
) -> None:
    """A start that waited for cores took 55 s: the next one is still taken to need the usual 6."""
    clock = Standing()
    monkeypatch.setattr(session, "time", clock)

    def run_case(request: Request, *_: object, **__: object) -> Result:
        clock.now += 57.0
        host = replace(a_host(), wait_share=waited)
        return a_result(request.case, host=host, samples=(Sample(2.0, (0.5,) * 4, 3.9),), phases=Phases())

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = wish_in(tmp_path, 600.0)
    begun = session.Session(run_request, suite_run.find_bench(run_request), 600.0, progress)
    begun.measure_one(Cell(a_case(), find_max=False), [], "")
    assert begun.overhead(a_case()) == later


def test_a_repeat_takes_no_more_than_the_case_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: Quiet
) -> None:
    """Both of two disturbed cases are repeated, and the optional one keeps its time."""
    clock, asked = Standing(), list[Request]()
    monkeypatch.setattr(session, "time", clock)

    def run_case(request: Request, *_: object, **__: object) -> Result:
        clock.now += min(request.share_seconds, 10.0)
        asked.append(request)
        return a_result(request.case, host=replace(a_host(), wait_share=0.4))

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = replace(wish_in(tmp_path, 0.0), budget_seconds=None)
    begun = session.Session(run_request, suite_run.find_bench(run_request), 60.0, progress)
    one, two, three = (a_case(scheduler=name) for name in ("ddim", "ddpm", "euler"))
    done = begun.measure([Cell(one, required=True), Cell(two, required=True), Cell(three)])
    assert [(each.case.scheduler, round(each.share_seconds)) for each in asked] == [
        ("ddim", 20),
        ("ddpm", 25),
        ("ddim", 10),
        ("ddpm", 10),
        ("euler", 20),
        ("euler", 10),
    ]
    assert [result.attempts for result in done] == [2, 2, 2]
    assert asked[2].limit_seconds == 40.0, "a repeat does not go over the budget"


def test_in_a_small_budget_the_time_is_theirs_who_must_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: Quiet
) -> None:
    clock, asked = Standing(), list[Request]()
    monkeypatch.setattr(session, "time", clock)

    def run_case(request: Request, *_: object, **__: object) -> Result:
        asked.append(request)
        clock.now += 18.0
        return a_result(request.case)

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = wish_in(tmp_path, 40.0)
    begun = session.Session(run_request, suite_run.find_bench(run_request), 40.0, progress)
    names = ("ddim", "ddpm", "euler", "heun")
    cells = [Cell(a_case(scheduler=name), required=name in {"ddim", "ddpm"}) for name in names]
    done = begun.measure(cells)
    assert [each.limit_seconds for each in asked] == [34.0, 22.0]
    assert [result.status for result in done] == [Status.OK, Status.OK, Status.SKIPPED, Status.SKIPPED]


def test_what_an_interrupt_left_out_is_in_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: Quiet
) -> None:
    def run_case(request: Request, *_: object, **__: object) -> Result:
        if request.case.scheduler == "ddpm":
            raise KeyboardInterrupt
        return a_result(request.case)

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = wish_in(tmp_path, 60.0)
    begun = session.Session(run_request, suite_run.find_bench(run_request), 60.0, progress)
    with pytest.raises(KeyboardInterrupt):
        begun.measure([Cell(a_case(), required=True), Cell(a_case(scheduler="ddpm"), required=True)])
    kept = store.load("", tmp_path / "out")
    assert [(each.status, each.reason, each.required) for each in kept.results] == [
        (Status.OK, None, True),
        (Status.SKIPPED, "interrupted before its turn", True),
    ]


def test_a_later_slower_start_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: Quiet) -> None:
    clock, took = Standing(), iter([10.0, 50.0])
    monkeypatch.setattr(session, "time", clock)

    def run_case(request: Request, *_: object, **__: object) -> Result:
        clock.now += next(took)
        return a_result(request.case, samples=(Sample(2.0, (0.5,) * 4, 3.9),), phases=Phases())

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = wish_in(tmp_path, 600.0)
    begun = session.Session(run_request, suite_run.find_bench(run_request), 600.0, progress)
    for _ in range(2):
        begun.measure_one(Cell(a_case(), find_max=False), [], "")
    assert begun.overhead(a_case()) == 8.0
