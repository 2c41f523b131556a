"""Builds the records of runs, returns command lines of `bench`, and provides fixtures with real measurements."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.codec import record
from bench.core.result import SCHEMA, Case, Host, Memory, Numerics, Phases, Result, Run, Sample, Status, Work
from bench.core.verdict import Verdict, VerdictState
from bench.launch import worker_process
from bench.run import request
from bench.validate import examine_host
from tests.bench.fake_examiner import END, EXAMINER
from tests.bench.fake_workers import RecordedProgress
from tests.bench.gpu.test_nvml import Driver
from tests.clock import Ticking
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.validate.examine_host import HostValidation


def a_case(**changes: Any) -> Case:
    """Return the case of the smallest model on the CPU; `changes` replace fields of the case."""
    case = Case(model="tiny-ddpm", device="cpu", dtype="fp32", scheduler="ddim", steps=4, batch=1, height=16, width=16)
    return replace(case, **changes)


def a_host(*, cpu_share: float | None = 0.97, steal_share: float | None = 0.0) -> Host:
    """Return the load of a host with two threads that no other program disturbs, unless a share says otherwise."""
    return Host(threads=2, cpu_share=cpu_share, steal_share=steal_share, load_average=1.0)


def a_result(case: Case | None = None, **changes: Any) -> Result:
    """Return the result of a successful case: three images of 2 s, with four steps of 0.5 s each.

    `changes` replace fields of the result.
    """
    result = Result(
        case=case or a_case(),
        status=Status.OK,
        weights="random",
        phases=Phases(imports_seconds=4.0, load_seconds=0.25, first_image_seconds=2.5),
        samples=(Sample(2.0, (0.5, 0.5, 0.5, 0.5), 3.9),) * 3,
        memory=Memory(host_load_peak_bytes=1_000_000_000, host_run_peak_bytes=1_234_000_000),
        work=Work(flops_per_step=34_459_648, flops_per_image=137_838_592, probe_flops_per_second=6.5e10),
        numerics=Numerics(finite=True, image="picture.png", image_sha256="0" * 64),
        host=a_host(),
        software={"python": "3.11.7", "torch": "2.9.0", "diffusers": "0.35.0"},
    )
    return replace(result, **changes)


def a_run(*results: Result, **changes: Any) -> Run:
    """Return a run of the tiny suite with the verdict pass; `results` defaults to one successful result.

    `changes` replace fields of the run.
    """
    run = Run(
        schema=SCHEMA,
        id="20260102T030405Z-tiny-abcdef",
        started="2026-01-02T03:04:05+00:00",
        seconds=42.5,
        machine=machine("A CPU"),
        suite="tiny",
        results=results or (a_result(),),
        verdict=Verdict(VerdictState.PASS),
    )
    return replace(run, **changes)


def machine(cpu: str, gpus: Sequence[str] = ()) -> dict[str, Any]:
    """Return the facts of a machine in the form in which a run stores them; `gpus` are names."""
    return {"cpu": cpu, "cores": 2, "memory_bytes": 8_000_000_000, "gpus": [{"name": name} for name in gpus]}


def command(*words: object) -> list[str]:
    """Return the command line of `bench` with these arguments, run by this interpreter."""
    return [sys.executable, "-m", "bench", *map(str, words)]


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment variables, with the checkout on PYTHONPATH, and with `changes`."""
    return dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)} | changes


def result_of(found: dict[str, Any], name: str) -> Result:
    """Return the result that measure_cases.py has stored under a name; `found` is the output of that program."""
    result: Result = record(found[name]["result"], Result, name)
    return result


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder into which measure_cases.py writes its pictures and snapshots."""
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="session")
def found(measured_python: Path, folder: Path) -> dict[str, Any]:
    """Run measure_cases.py once, and return its output: {name: result and events of a measured case, and others}."""
    script = Path(__file__).with_name("measure_cases.py")
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    done = subprocess.run(
        [measured_python, script, folder], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.fixture
def _default_sigint() -> Iterator[None]:
    """Give SIGINT its default handler: a shell starts background programs and so their children with it ignored."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Replace pynvml by the recorded answers of a healthy H100 on which no other process runs."""
    fake_driver = Driver("h100", monkeypatch)
    fake_driver.answers["nvmlDeviceGetComputeRunningProcesses"] = []
    fake_driver.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0
    return fake_driver


@pytest.fixture
def progress() -> RecordedProgress:
    return RecordedProgress()


@pytest.fixture
def validate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: RecordedProgress
) -> Callable[..., HostValidation]:
    """Return a function that validates with the program of fake_examiner.py in place of the worker.

    Its arguments are Python code that changes the program, the seconds of a soak, the soak rounds that fit into them,
    and fields of the request.
    """

    def run_program(program: str = "", *, soak: float | None = None, rounds: int = 1, **changes: Any) -> HostValidation:
        file = tmp_path / "examiner.py"
        file.write_text(EXAMINER + program + END)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(worker_process, "worker_command", lambda python: [str(python), str(file)])
        if soak is not None:  # the clock is read at the beginning of the soak, and before and after each round
            monkeypatch.setattr(examine_host, "time", Ticking(soak / (2 * rounds)))
        defaults: dict[str, Any] = {"suite": "validate", "root": str(tmp_path), "out": tmp_path / "out"}
        run_request = request.RunRequest(**defaults | {"python": Path(sys.executable)} | changes)
        return examine_host.validate(run_request, progress, soak_seconds=soak)

    return run_program
