"""A device's examination by its parent: its worker, its card, what is asked again, what ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pynvml
import pytest

from bench.launch import pipe, worker_process
from bench.run import request
from bench.validate import host
from tests.bench.fake_examiner import FAIL, OPEN, PASS, WARN, asked, judged, planted
from tests.bench.fake_workers import Quiet
from tests.clock import Until

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.validation_records import VerdictState
    from bench.validate.host import HostValidation
    from tests.bench.gpu.test_nvml import Driver


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("end", "turns", "state"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "True", FAIL),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "turn == 1", WARN),
        ("os.kill(os.getpid(), signal.SIGKILL)", "True", OPEN),
    ],
    ids=["twice", "once", "by the host"],
)
def test_a_worker_that_ends(validate: Callable[..., HostValidation], end: str, turns: str, state: VerdictState) -> None:
    """While it multiplies; the host ends what has no memory left, and that is no fault of a card."""
    found = validate(planted("product", end, turns=turns))
    assert found.run.verdict.state is state
    assert asked().count("cuda:0 product") == 2
    assert found.run.validation is not None
    (process,) = [each for each in found.run.validation.readings if each.name == "process"]
    told = (process.fault or "") + (process.why_not or "")
    assert ("in the phase 'product'" in told) is (turns == "True")


def test_errors_that_come_meanwhile(validate: Callable[..., HostValidation], driver: Driver) -> None:
    """The driver counts four more when the card has been asked."""
    driver.answers["nvmlEventSetWait_v2"] = [{"eventType": 8, "eventData": 63}]
    found = validate("Path('asked').touch()\n")
    assert [each.state for each in judged(found, "xid-hardware")] == [FAIL]

    class Counting(Quiet):
        def say(self, line: str) -> None:
            driver.answers["nvmlDeviceGetTotalEccErrors"] = {"0": 4, "1": 0}
            super().say(line)

    with pytest.MonkeyPatch.context():
        run_request = request.RunRequest(
            suite="validate", root=str(Path.cwd()), out=Path("out"), python=Path(sys.executable), device="cuda:0"
        )
        again = host.validate(run_request, Counting())
    assert [each.state for each in judged(again, "ecc-corrected-growth")] == [WARN]


@pytest.mark.usefixtures("driver")
def test_a_card_that_has_failed_its_worker_is_asked_again_by_another(validate: Callable[..., HostValidation]) -> None:
    """After most of CUDA's errors a process can compute nothing more."""
    broken = "values['fault'] = 'CUDA error: an illegal memory access was encountered'; globals()['dead'] = True"
    program = "dead = False\n" + planted("memory", broken, turns="turn == 1 or dead")
    found = validate(program)
    assert found.run.verdict.state is WARN
    assert asked()[7:] == ["cuda:0 memory"]


@pytest.mark.usefixtures("driver")
def test_a_worker_that_hangs_is_no_second_time_waited_for(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "EVERY_SECONDS", 0.01)
    clock = Until(lambda: Path("asked").exists() and "cuda:0 product" in asked())
    monkeypatch.setattr(pipe, "time", clock)
    monkeypatch.setattr(worker_process, "time", clock)
    found = validate(planted("product", "sys.stdin.read()"))
    assert found.run.verdict.state is FAIL
    assert "the worker hung in the phase 'product'" in found.run.verdict.reasons[0]
    assert asked() == ["cuda:0 numerics", "cuda:0 product"]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("turns", "state"), [("turn == 2", WARN), ("turn > 1", FAIL)])
def test_what_a_round_finds_is_asked_again_too(
    validate: Callable[..., HostValidation], turns: str, state: VerdictState
) -> None:
    found = validate(planted("memory", "values['fault'] = '1 word'", turns=turns), soak=0.01)
    assert found.run.verdict.state is state
    assert asked()[7:] == [
        *(f"cuda:0 {phase}" for phase in ("product", "copy", "memory", "sustained")),
        "cuda:0 memory",
    ]


def test_a_round_tells_what_the_driver_has_counted(
    validate: Callable[..., HostValidation], driver: Driver, progress: Quiet
) -> None:
    driver.answers["nvmlEventSetWait_v2"] = [{"eventType": 8, "eventData": 63}]
    counts = iter(range(100))
    driver.answers["nvmlDeviceGetTotalEccErrors"] = Counting(lambda: next(counts))
    validate(soak=0.01)
    (line,) = [line for line in progress.lines if line.startswith("  round 1")]
    assert "XID 63" in line
    assert "memory errors corrected" in line
    assert "memory errors not corrected" in line


class Counting(dict[str, int]):
    """An answer by number that is another one each time."""

    def __init__(self, answer: Callable[[], int]) -> None:
        super().__init__({"0": 0, "1": 0})
        self._answer = answer

    def __getitem__(self, _: str) -> int:
        return self._answer()


@pytest.mark.usefixtures("driver")
def test_a_link_is_read_while_its_card_works(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An idle one slows down: it is so before, and after the last phase has ended."""
    generations = iter([1, 5])
    os.mkfifo(tmp_path / "gate")
    looks: list[int] = []

    def link(_: object) -> int:
        looks.append(next(generations, 1))
        if len(looks) == 2:
            Path("gate").write_text("")  # now the worker may go on
        return looks[-1]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrPcieLinkGeneration", link)
    found = validate(planted("memory", "Path('gate').read_text()"))
    assert found.run.verdict.state is PASS, found.run.verdict.reasons
    assert found.run.validation is not None
    assert [card.pcie_generation for card in found.run.validation.cards] == [5]


@pytest.mark.usefixtures("driver")
def test_our_own_process_is_no_other(validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [SimpleNamespace(pid=1, usedGpuMemory=1)]
    lists: Any = iter([[]])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: next(lists, ours))
    found = validate()
    assert found.run.verdict.state is PASS, found.run.verdict.reasons
    assert found.run.validation is not None
    assert [card.others for card in (*found.run.validation.before, *found.run.validation.cards)] == [0, 0]


CROWDED = "HOST = Host(threads=2, cpu_share=0.5, steal_share=0.0, load_average=9.0, wait_share=0.5)\n"


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("device", "state"), [("cuda:0", PASS), ("cpu", OPEN)])
def test_a_crowded_host_leaves_its_cpu_open_and_no_card(
    validate: Callable[..., HostValidation], device: str, state: VerdictState
) -> None:
    assert validate(CROWDED, device=device).run.verdict.state is state


def test_a_load_that_only_the_first_worker_saw_stays_known(validate: Callable[..., HostValidation]) -> None:
    """The second one asks for memory alone: it cannot tell what else the host did under load."""
    blind = "HOST = Host(threads=2, cpu_share=None, steal_share=None, load_average=None)"
    program = CROWDED + "if Path('asked').exists(): " + blind + "\n"
    found = validate(program + planted("memory", "values['fault'] = '1 word'", turns="turn == 1"), device="cpu")
    assert found.run.validation is not None
    assert "cpu" in found.run.validation.disturbed
