"""Tests how the parent examines one device: which phases it repeats, and what it makes of a worker that ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pynvml
import pytest

from bench.launch import child_process, worker_process
from bench.run import request
from bench.validate import examine_host
from tests.bench.fake_examiner import FAIL, OPEN, PASS, WARN, changed_in, judgements_of, logged_phases
from tests.bench.fake_workers import RecordedProgress
from tests.clock import Until

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.verdict import VerdictState
    from bench.validate.examine_host import HostValidation
    from tests.bench.gpu.test_nvml import Driver


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("end", "turns", "state"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "True", FAIL),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "turn == 1", WARN),
        ("os.kill(os.getpid(), signal.SIGKILL)", "True", OPEN),
    ],
    ids=["crash in both attempts", "crash in one attempt", "killed by the host"],
)
def test_crash_of_a_worker_counts_against_the_device_and_sigkill_does_not(
    validate: Callable[..., HostValidation], end: str, turns: str, state: VerdictState
) -> None:
    # The worker ends in the phase "product". SIGKILL comes from the host, for lack of memory.
    validation = validate(changed_in("product", end, turns=turns))
    assert validation.run.verdict.state is state
    assert logged_phases().count("cuda:0 product") == 2
    assert validation.run.validation is not None
    (process,) = [reading for reading in validation.run.validation.readings if reading.name == "process"]
    message = (process.fault or "") + (process.why_not or "")
    assert ("in the phase 'product'" in message) is (turns == "True")


def test_xids_and_memory_errors_that_appear_during_the_validation_are_judged(
    validate: Callable[..., HostValidation], driver: Driver
) -> None:
    # In the first validation, the driver reports an XID. In the second, its count of memory errors grows by four.
    driver.answers["nvmlEventSetWait_v2"] = [{"eventType": 8, "eventData": 63}]
    validation = validate("Path('phases').touch()\n")
    assert [item.state for item in judgements_of(validation, "xid-hardware")] == [FAIL]

    class CountingProgress(RecordedProgress):
        def report(self, line: str) -> None:
            driver.answers["nvmlDeviceGetTotalEccErrors"] = {"0": 4, "1": 0}
            super().report(line)

    with pytest.MonkeyPatch.context():
        run_request = request.RunRequest(
            suite="validate", root=str(Path.cwd()), out=Path("out"), python=Path(sys.executable), device="cuda:0"
        )
        again = examine_host.validate(run_request, CountingProgress())
    assert [item.state for item in judgements_of(again, "ecc-corrected-growth")] == [WARN]


@pytest.mark.usefixtures("driver")
def test_phase_with_a_fault_is_repeated_in_a_new_worker(validate: Callable[..., HostValidation]) -> None:
    # After most CUDA errors, the same process cannot compute any more. The global `dead` simulates that.
    broken = "values['fault'] = 'CUDA error: an illegal memory access was encountered'; globals()['dead'] = True"
    program = "dead = False\n" + changed_in("memory", broken, turns="turn == 1 or dead")
    validation = validate(program)
    assert validation.run.verdict.state is WARN
    assert logged_phases()[7:] == ["cuda:0 memory"]


@pytest.mark.usefixtures("driver")
def test_phase_in_which_the_worker_hung_is_not_repeated(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "POLL_SECONDS", 0.01)
    clock = Until(lambda: Path("phases").exists() and "cuda:0 product" in logged_phases())
    monkeypatch.setattr(child_process, "time", clock)
    monkeypatch.setattr(worker_process, "time", clock)
    validation = validate(changed_in("product", "sys.stdin.read()"))
    assert validation.run.verdict.state is FAIL
    assert "the worker hung in the phase 'product'" in validation.run.verdict.reasons[0]
    assert logged_phases() == ["cuda:0 numerics", "cuda:0 product"]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("turns", "state"), [("turn == 2", WARN), ("turn > 1", FAIL)])
def test_phase_with_a_fault_in_a_soak_round_is_repeated(
    validate: Callable[..., HostValidation], turns: str, state: VerdictState
) -> None:
    validation = validate(changed_in("memory", "values['fault'] = '1 word'", turns=turns), soak=0.01)
    assert validation.run.verdict.state is state
    assert logged_phases()[7:] == [
        *(f"cuda:0 {phase}" for phase in ("product", "copy", "memory", "sustained")),
        "cuda:0 memory",
    ]


def test_progress_of_a_soak_round_has_the_xids_and_memory_errors_of_the_driver(
    validate: Callable[..., HostValidation], driver: Driver, progress: RecordedProgress
) -> None:
    driver.answers["nvmlEventSetWait_v2"] = [{"eventType": 8, "eventData": 63}]
    counts = iter(range(100))
    driver.answers["nvmlDeviceGetTotalEccErrors"] = ChangingCounters(lambda: next(counts))
    validate(soak=0.01)
    (line,) = [line for line in progress.lines if line.startswith("  round 1")]
    assert "XID 63" in line
    assert "memory errors corrected" in line
    assert "memory errors not corrected" in line


class ChangingCounters(dict[str, int]):
    """Stands in for the driver's error counts: each read calls a function, so that the count can grow."""

    def __init__(self, answer: Callable[[], int]) -> None:
        super().__init__({"0": 0, "1": 0})
        self._answer = answer

    def __getitem__(self, _: str) -> int:
        return self._answer()


@pytest.mark.usefixtures("driver")
def test_pcie_link_is_read_while_the_gpu_works(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # An idle PCIe link slows down: it shows generation 1 before the examination and after its last phase.
    generations = iter([1, 5])
    os.mkfifo(tmp_path / "gate")
    reads: list[int] = []

    def link(_: object) -> int:
        reads.append(next(generations, 1))
        if len(reads) == 2:
            Path("gate").write_text("")  # the worker waits for this text in its phase "memory"
        return reads[-1]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrPcieLinkGeneration", link)
    validation = validate(changed_in("memory", "Path('gate').read_text()"))
    assert validation.run.verdict.state is PASS, validation.run.verdict.reasons
    assert validation.run.validation is not None
    assert [card.pcie_generation for card in validation.run.validation.cards] == [5]


@pytest.mark.usefixtures("driver")
def test_own_worker_on_the_gpu_is_not_counted_as_another_process(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_worker = [SimpleNamespace(pid=1, usedGpuMemory=1)]
    lists: Any = iter([[]])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: next(lists, own_worker))
    validation = validate()
    assert validation.run.verdict.state is PASS, validation.run.verdict.reasons
    assert validation.run.validation is not None
    assert [card.others for card in (*validation.run.validation.before, *validation.run.validation.cards)] == [0, 0]


BUSY_HOST = "HOST = Host(threads=2, cpu_share=0.5, steal_share=0.0, load_average=9.0, wait_share=0.5)\n"


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("device", "state"), [("cuda:0", PASS), ("cpu", OPEN)])
def test_busy_host_prevents_a_verdict_on_its_cpu_and_not_on_its_gpu(
    validate: Callable[..., HostValidation], device: str, state: VerdictState
) -> None:
    assert validate(BUSY_HOST, device=device).run.verdict.state is state


def test_host_load_is_that_of_the_first_worker_if_a_second_one_repeats_a_phase(
    validate: Callable[..., HostValidation],
) -> None:
    # The second worker runs only the memory phase, in which the host load is not measured.
    without_load = "HOST = Host(threads=2, cpu_share=None, steal_share=None, load_average=None)"
    program = BUSY_HOST + "if Path('phases').exists(): " + without_load + "\n"
    validation = validate(program + changed_in("memory", "values['fault'] = '1 word'", turns="turn == 1"), device="cpu")
    assert validation.run.validation is not None
    assert "cpu" in validation.run.validation.disturbed
