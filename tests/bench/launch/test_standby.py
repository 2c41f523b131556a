"""Tests standby workers, which import torch before their request arrives: with a program, and with the real worker."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from bench.core.result import Status
from bench.core.worker_requests import CaseRequest
from bench.launch import standby, worker_process
from bench.run import measure_cases, suite_run
from bench.run.cases import Cell
from provision.host import facts
from tests.bench.conftest import a_case
from tests.bench.fake_workers import PLAIN, WORKER, RecordedProgress
from tests.bench.run.test_suite_run import logged_requests, request_in
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.launch.standby import StandbyWorkers

NO_HUB = Path(os.devnull)
# Waits for a request after the line "prepare", like the real worker, and logs each of the two with its process id.
# FAULT is replaced by code that runs in between.
PREPARED = f"""
import io, json, os, sys
sys.path.insert(0, {str(CHECKOUT)!r})
line = sys.stdin.readline()
log = open("starts", "a")
if json.loads(line) == {{"prepare": True}}:
    log.write(f"prepared {{os.getpid()}}\\n"); log.flush()
    FAULT
    print(json.dumps({{"phase": "waiting"}}), flush=True)
    line = sys.stdin.readline()
log.write(f"request {{os.getpid()}}\\n"); log.flush()
sys.stdin = io.StringIO(line)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandbyWorkers]]:
    """Return a function that makes a pool of standby workers, which run PREPARED in place of the worker.

    Its arguments are the size of the pool, and code that replaces FAULT.
    """
    pools: list[StandbyWorkers] = []

    def make(size: int = 3, fault: str = "pass") -> StandbyWorkers:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "program.py").write_text(PREPARED.replace("FAULT", fault) + WORKER + PLAIN)
        command = [sys.executable, str(tmp_path / "program.py")]
        monkeypatch.setattr(worker_process, "worker_command", lambda _: command)
        pools.append(standby.StandbyWorkers(Path(sys.executable), NO_HUB, size))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def starts() -> list[str]:
    """Return "prepared" or "request" for each line that a worker has received, in order."""
    return [line.split()[0] for line in Path("starts").read_text().splitlines()]


def a_request() -> CaseRequest:
    return CaseRequest(a_case(), time.time(), 60.0, 60.0, {}, None)


def test_worker_from_the_pool_measures_a_case_without_a_new_process(pool: Callable[..., StandbyWorkers]) -> None:
    workers = pool()
    workers.fill(5)
    assert workers.count == 3
    assert starts() == ["prepared"] * 3
    worker = workers.take(Path(sys.executable))
    result = worker_process.run_case(a_request(), Path(sys.executable), hub=NO_HUB, prepared=worker)
    assert (result.status, len(result.samples), workers.count) == (Status.OK, 6, 2)
    assert starts() == ["prepared"] * 3 + ["request"]
    assert {moment.phase for moment in result.timeline} <= {"start", "samples"}, (
        "the time in the pool is not part of the case"
    )


def test_closing_the_pool_ends_its_processes(pool: Callable[..., StandbyWorkers]) -> None:
    workers = pool()
    workers.fill(3)
    pids = [int(line.split()[1]) for line in Path("starts").read_text().splitlines()]
    workers.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(("size", "needed"), [(1, 5), (3, 1), (0, 5)])
def test_pool_stays_empty_if_it_could_hold_or_would_need_at_most_one_worker(
    pool: Callable[..., StandbyWorkers], size: int, needed: int
) -> None:
    workers = pool(size)
    workers.fill(needed)
    assert (workers.count, workers.take(Path(sys.executable))) == (0, None)


def test_pool_has_no_worker_for_another_interpreter(pool: Callable[..., StandbyWorkers]) -> None:
    workers = pool()
    workers.fill(3)
    assert workers.take(Path("/another/python")) is None


def test_worker_that_ends_during_its_imports_is_not_in_the_pool(pool: Callable[..., StandbyWorkers]) -> None:
    workers = pool(fault="if os.getpid() % 1 == 0: os._exit(1)")
    workers.fill(3)
    assert workers.count == 0


def test_size_of_the_pool_is_limited_by_cores_quota_and_memory() -> None:
    host = replace(facts.probe(), cores=16, cpu_quota=None, memory_bytes=135_000_000_000)
    assert standby.fitting(host) == 8
    assert standby.fitting(replace(host, cpu_quota=4.0)) == 2
    assert standby.fitting(replace(host, memory_bytes=13_000_000_000)) == 3
    assert standby.fitting(replace(host, cores=2)) == 1


def test_cases_on_a_gpu_use_standby_workers_and_cases_on_the_cpu_do_not(
    pool: Callable[..., StandbyWorkers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool()
    monkeypatch.setattr(measure_cases, "fitting", lambda _: 2)
    run_request = request_in(tmp_path, 600.0)
    session = measure_cases.Session(run_request, suite_run.find_bench(run_request), 600.0, RecordedProgress())
    cells = [Cell(a_case(device="cuda:0", scheduler=name)) for name in ("ddim", "ddpm", "euler", "heun")]
    results = session.measure([*cells, Cell(a_case())])
    session.close()
    assert [result.status for result in results] == [Status.OK] * 5
    assert [logged["case"]["device"] for logged in logged_requests()] == ["cuda:0"] * 4 + ["cpu"]
    assert starts() == (["prepared"] * 2 + ["request"] * 2) * 2 + ["request"]


@pytest.mark.worker
def test_real_standby_worker_reports_the_seconds_of_its_imports(measured_python: Path, tmp_path: Path) -> None:
    workers = standby.StandbyWorkers(measured_python, NO_HUB, 2)
    try:
        workers.fill(2)
        worker = workers.take(measured_python)
        request = replace(a_request(), image=str(tmp_path / "image.png"), share_seconds=0.0, limit_seconds=600.0)
        result = worker_process.run_case(request, measured_python, hub=NO_HUB, prepared=worker)
    finally:
        workers.close()
    assert (result.status, result.reason) == (Status.OK, None)
    assert result.phases.imports_seconds is not None
    assert result.phases.imports_seconds > 0.5, "the imports were made before the request, and are reported with it"
