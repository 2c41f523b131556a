"""Tests how a session divides its budget and repeats cases, with a clock that the test advances."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.core.result import Phases, Result, Sample, Status
from bench.core.worker_requests import CaseRequest
from bench.launch import worker_process
from bench.run import measure_cases, store, suite_run
from bench.run.cases import Cell
from tests.bench.conftest import a_case, a_host, a_result
from tests.bench.fake_workers import RecordedProgress
from tests.bench.run.test_suite_run import request_in
from tests.clock import Standing

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def progress() -> RecordedProgress:
    return RecordedProgress()


def test_disturbed_case_is_not_repeated_if_no_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress
) -> None:
    monkeypatch.setattr(worker_process, "run_case", lambda *_, **__: pytest.fail("there is no time"))
    run_request = request_in(tmp_path, 60.0)
    run_session = measure_cases.Session(run_request, suite_run.find_bench(run_request), 60.0, progress)
    disturbed = a_result(host=replace(a_host(), wait_share=0.4))
    assert run_session.measure_again(Cell(a_case(), find_max=False), disturbed, 61.0, "") is disturbed


@pytest.mark.parametrize(("waited", "later"), [(0.4, 6.0), (0.0, 55.0)])
def test_overhead_of_a_case_is_learned_only_from_undisturbed_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress, waited: float, later: float
) -> None:
    # The first start took 55 s. If it had to wait for cores, the overhead stays at the default of 6 s.
    clock = Standing()
    monkeypatch.setattr(measure_cases, "time", clock)

    def run_case(request: CaseRequest, *_: object, **__: object) -> Result:
        clock.now += 57.0
        host = replace(a_host(), wait_share=waited)
        return a_result(request.case, host=host, samples=(Sample(2.0, (0.5,) * 4, 3.9),), phases=Phases())

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = request_in(tmp_path, 600.0)
    run_session = measure_cases.Session(run_request, suite_run.find_bench(run_request), 600.0, progress)
    run_session.measure_one(Cell(a_case(), find_max=False), [], "")
    assert run_session.overhead(a_case()) == later


def test_repetition_of_a_disturbed_case_may_take_as_long_as_its_first_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress
) -> None:
    # Both required cases are disturbed and repeated; the time of the optional case stays reserved.
    clock, requests = Standing(), list[CaseRequest]()
    monkeypatch.setattr(measure_cases, "time", clock)

    def run_case(request: CaseRequest, *_: object, **__: object) -> Result:
        clock.now += min(request.share_seconds, 10.0)
        requests.append(request)
        return a_result(request.case, host=replace(a_host(), wait_share=0.4))

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = replace(request_in(tmp_path, 0.0), budget_seconds=None)
    run_session = measure_cases.Session(run_request, suite_run.find_bench(run_request), 60.0, progress)
    one, two, three = (a_case(scheduler=name) for name in ("ddim", "ddpm", "euler"))
    results = run_session.measure([Cell(one, required=True), Cell(two, required=True), Cell(three)])
    assert [(item.case.scheduler, round(item.share_seconds)) for item in requests] == [
        ("ddim", 20),
        ("ddpm", 25),
        ("ddim", 10),
        ("ddpm", 10),
        ("euler", 20),
        ("euler", 10),
    ]
    assert [result.attempts for result in results] == [2, 2, 2]
    assert requests[2].limit_seconds == 40.0, "a repetition does not exceed the budget"


def test_budget_too_small_for_all_cases_is_spent_on_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress
) -> None:
    # Twenty starts of 6 s alone exceed the budget of 90 s; the first cases get a figure, and no time is reserved for
    # the starts of the last ones.
    clock, requests = Standing(), list[CaseRequest]()
    monkeypatch.setattr(measure_cases, "time", clock)

    def run_case(request: CaseRequest, *_: object, **__: object) -> Result:
        requests.append(request)
        clock.now += 6.0 + 4.0
        return a_result(request.case, samples=(Sample(1.0, (0.25,) * 4, 0.9),) * 3, phases=Phases(4.0, 0.1, 1.0))

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = request_in(tmp_path, 90.0)
    run_session = measure_cases.Session(run_request, suite_run.find_bench(run_request), 90.0, progress)
    results = run_session.measure([Cell(a_case(seed=seed)) for seed in range(20)])
    assert [result.status for result in results] == [Status.OK] * 9 + [Status.SKIPPED] * 11
    assert (requests[0].limit_seconds, requests[8].limit_seconds) == (90.0, 10.0)
    assert all(result.cause.startswith("the budget leaves 0 s") for result in results[9:])


def test_budget_too_small_for_all_cases_is_spent_on_the_required_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress
) -> None:
    clock, requests = Standing(), list[CaseRequest]()
    monkeypatch.setattr(measure_cases, "time", clock)

    def run_case(request: CaseRequest, *_: object, **__: object) -> Result:
        requests.append(request)
        clock.now += 18.0
        return a_result(request.case)

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = request_in(tmp_path, 40.0)
    run_session = measure_cases.Session(run_request, suite_run.find_bench(run_request), 40.0, progress)
    names = ("ddim", "ddpm", "euler", "heun")
    cells = [Cell(a_case(scheduler=name), required=name in {"ddim", "ddpm"}) for name in names]
    results = run_session.measure(cells)
    assert [item.limit_seconds for item in requests] == [34.0, 22.0]
    assert [result.status for result in results] == [Status.OK, Status.OK, Status.SKIPPED, Status.SKIPPED]


def test_interrupted_run_stores_a_skipped_result_for_each_case_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress
) -> None:
    def run_case(request: CaseRequest, *_: object, **__: object) -> Result:
        if request.case.scheduler == "ddpm":
            raise KeyboardInterrupt
        return a_result(request.case)

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = request_in(tmp_path, 60.0)
    run_session = measure_cases.Session(run_request, suite_run.find_bench(run_request), 60.0, progress)
    with pytest.raises(KeyboardInterrupt):
        run_session.measure([Cell(a_case(), required=True), Cell(a_case(scheduler="ddpm"), required=True)])
    kept = store.load("", tmp_path / "out")
    assert [(result.status, result.reason, result.required) for result in kept.results] == [
        (Status.OK, None, True),
        (Status.SKIPPED, "interrupted before its turn", True),
    ]


def test_overhead_of_a_case_is_that_of_the_shortest_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress
) -> None:
    clock, durations = Standing(), iter([10.0, 50.0])
    monkeypatch.setattr(measure_cases, "time", clock)

    def run_case(request: CaseRequest, *_: object, **__: object) -> Result:
        clock.now += next(durations)
        return a_result(request.case, samples=(Sample(2.0, (0.5,) * 4, 3.9),), phases=Phases())

    monkeypatch.setattr(worker_process, "run_case", run_case)
    run_request = request_in(tmp_path, 600.0)
    run_session = measure_cases.Session(run_request, suite_run.find_bench(run_request), 600.0, progress)
    for _ in range(2):
        run_session.measure_one(Cell(a_case(), find_max=False), [], "")
    assert run_session.overhead(a_case()) == 8.0
