"""Tests whole validations, with a program in place of the worker and recorded answers of the GPU's driver."""

from __future__ import annotations

import signal
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import verdict
from bench.core.errors import Exit
from bench.core.validation_records import PROCESS
from bench.gpu import diagnosis
from bench.gpu.device_nodes import DeviceNode, GpuVisibility
from bench.run import request, store, suite_run
from bench.validate import examine_device, examine_host, history
from provision.core.errors import BlockedError, SpecError
from provision.host import facts
from provision.host.facts import Gpu
from tests.bench.fake_examiner import FAIL, OPEN, PASS, TWO, WARN, changed_in, judgements_of, logged_phases

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.verdict import VerdictState
    from bench.validate.examine_host import HostValidation
    from tests.bench.fake_workers import RecordedProgress


@pytest.mark.usefixtures("driver")
def test_healthy_gpu_passes_and_its_run_is_stored_in_the_results_and_in_the_history(
    validate: Callable[..., HostValidation], tmp_path: Path
) -> None:
    validation = validate()
    assert validation.run.verdict.state is PASS, validation.run.verdict.reasons
    assert verdict.exit_code(validation.run.verdict) is Exit.GOOD
    assert store.load("", tmp_path / "out") == validation.run
    assert history.load(
        suite_run.find_root(request.RunRequest(suite="", out=tmp_path, root=str(tmp_path))).validations
    ).runs == (validation.run,)
    (product,) = judgements_of(validation, "product")
    assert (product.state, product.expected, product.confidence) == (PASS, 783.66e12, "measured")
    (card,) = validation.run.validation.cards if validation.run.validation else ()
    assert (card.uuid, card.driver_sees, card.power_limit_watts) == (
        "GPU-00000000-0000-0000-0000-000000000090",
        True,
        700,
    )
    assert len(logged_phases()) == 7, "no phase was repeated"


@pytest.mark.usefixtures("driver")
def test_gpu_slower_than_its_own_best_value_is_a_warning_and_the_phase_is_repeated(
    validate: Callable[..., HostValidation],
) -> None:
    validate()
    (later,) = judgements_of(validate(changed_in("loop", "values['step'] = 0.03")), "loop")
    assert (later.state, later.expected, later.confidence) == (WARN, 0.02, "own")
    assert "its own best value, run" in later.said
    assert logged_phases()[14:] == ["cuda:0 loop"], "the phase with the warning was repeated"


@pytest.mark.usefixtures("driver")
def test_slow_phase_is_repeated_once_before_the_gpu_fails(validate: Callable[..., HostValidation]) -> None:
    validation = validate(changed_in("product", "values['product'] = 300 * T"))
    assert verdict.exit_code(validation.run.verdict) is Exit.VERDICT_FAIL
    assert logged_phases()[7:] == ["cuda:0 product"]
    (product,) = judgements_of(validation, "product")
    assert product.state is FAIL
    assert "300.0 TFLOP/s is 38% of the expected 783.7 TFLOP/s" in product.said
    assert "ticket" in product.advice


@pytest.mark.usefixtures("driver")
def test_phase_that_is_slow_only_the_first_time_passes(validate: Callable[..., HostValidation]) -> None:
    validation = validate(changed_in("product", "values['product'] = 300 * T", turns="turn == 1"))
    assert validation.run.verdict.state is PASS
    assert validation.run.validation is not None
    assert [item.value for item in validation.run.validation.readings if item.probe == "product"] == [780e12]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("turns", "state"), [("True", FAIL), ("turn == 1", WARN)])
def test_memory_fault_fails_if_it_repeats_and_is_a_warning_otherwise(
    validate: Callable[..., HostValidation], turns: str, state: VerdictState
) -> None:
    validation = validate(changed_in("memory", "values['fault'] = '1 word of 8 bytes did not come back'", turns=turns))
    assert validation.run.verdict.state is state
    assert "memory" in validation.run.verdict.reasons[0]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("turns", "state"), [("True", FAIL), ("turn == 1", WARN)])
def test_wrong_matrix_product_fails_if_it_repeats_and_is_a_warning_otherwise(
    validate: Callable[..., HostValidation], turns: str, state: VerdictState
) -> None:
    validation = validate(changed_in("numerics", "values['error'] = 0.3", turns=turns))
    assert validation.run.verdict.state is state
    assert logged_phases()[7:] == ["cuda:0 numerics"]


@pytest.mark.usefixtures("driver")
def test_slower_of_two_equal_gpus_is_a_warning_that_names_it(
    validate: Callable[..., HostValidation], progress: RecordedProgress
) -> None:
    slower = "    if device == 'cuda:1' and phase == 'product': values['product'] = 640 * T\n"
    validation = validate(f"{TWO}def before(phase, turn, values):\n{slower}")
    (slowest,) = judgements_of(validation, "slowest")
    assert (slowest.state, slowest.device) == (WARN, "cuda:1")
    assert validation.run.validation is not None
    probes = {item.probe for item in validation.run.validation.readings}
    assert {"together", "links"} <= probes
    assert any(line.strip().startswith("all at once") for line in progress.lines)


@pytest.mark.usefixtures("driver")
def test_gpus_that_are_slower_when_all_work_at_once_are_a_warning(validate: Callable[..., HostValidation]) -> None:
    # Alone, each GPU reaches 780 TFLOP/s. In its second run of the phase, when all work at once, it reaches 600.
    validation = validate(TWO + changed_in("product", "values['product'] = 600 * T", turns="turn == 2"))
    assert {item.device for item in judgements_of(validation, "together") if item.state is WARN} == {"cuda:0", "cuda:1"}


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("ends", "state"), [("True", FAIL), ("not Path('linked').exists()", WARN)])
def test_link_test_whose_worker_exits_fails_if_it_repeats_and_is_a_warning_otherwise(
    validate: Callable[..., HostValidation], ends: str, state: VerdictState
) -> None:
    default_links = "    emit({'reading': plain(Reading('links', 'links', 'cuda:0', 'B/s', 1.0))})\n"
    validation = validate(
        f"{TWO}def links():\n    ends = {ends}\n    Path('linked').touch()\n    if ends: os._exit(3)\n{default_links}"
    )
    assert validation.run.verdict.state is state
    assert ("(exit code 3)" in validation.run.verdict.reasons[0]) is (state is FAIL)


def test_planned_seconds_of_a_device_are_its_share_of_the_budget_but_at_least_ten() -> None:
    assert examine_host.plan_seconds(60.0, 1) == 48.0
    for count in (2, 8):
        plan = examine_host.plan_seconds(60.0 + 40.0 * (count - 1), count)
        assert 25 < plan < 48
        assert plan * count < 60 + 40 * (count - 1)
    assert examine_host.plan_seconds(1.0, 8) == 10.0, "not less than the start of a worker"


@pytest.mark.usefixtures("driver")
def test_soak_repeats_rounds_until_its_time_is_over_and_reports_drift(validate: Callable[..., HostValidation]) -> None:
    faded = changed_in("product", "values['product'] = (780 - 100 * (turn > 2)) * T")
    validation = validate(faded, soak=1.0, rounds=3)
    assert validation.run.validation is not None
    rounds = {item.round for item in validation.run.validation.readings}
    assert rounds == {0, 1, 2, 3}
    assert validation.run.validation.soak_seconds is not None
    assert validation.run.validation.soak_seconds >= 1
    (drift,) = judgements_of(validation, "drift")
    assert drift.state is WARN
    assert not validation.interrupted


@pytest.mark.usefixtures("driver", "_default_sigint")
def test_sigint_ends_a_soak_at_once_and_keeps_the_readings_so_far(
    validate: Callable[..., HostValidation], tmp_path: Path, progress: RecordedProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first round is complete; SIGINT arrives in the second one, while the GPU works.
    interrupt = "os.kill(os.getppid(), signal.SIGINT); sys.stdin.read()"
    stopped = []
    original_stop = examine_device.DeviceExamination.stop

    def stop(self: examine_device.DeviceExamination) -> None:
        stopped.append(self.device)
        original_stop(self)

    monkeypatch.setattr(examine_device.DeviceExamination, "stop", stop)
    validation = validate(changed_in("memory", interrupt, turns="turn == 3"), soak=3600.0, rounds=9)
    assert stopped == ["cuda:0"], "the worker was stopped, and the round not completed"
    assert validation.interrupted
    assert validation.run.verdict.state is PASS
    assert store.load("", tmp_path / "out") == validation.run
    assert validation.run.validation is not None
    rounds = {(item.round, item.probe) for item in validation.run.validation.readings if item.round}
    whole = {(1, probe) for probe in ("product", "copy", "memory", "sustained")}
    assert rounds == whole | {(2, "product"), (2, "copy")}, (
        "the first round, and the readings of the second one before SIGINT"
    )
    assert validation.run.validation.software == {"torch": "2.13.0"}
    assert any("interrupted" in line for line in progress.lines)


class InterruptedPool(ThreadPoolExecutor):
    """Let another thread take SIGINT, so that Python raises the interrupt in the middle of the main thread's code."""

    def submit(self, *arguments: Any, **keywords: Any) -> Future[Any]:
        future = super().submit(*arguments, **keywords)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while wait([future], 0.1).not_done:
            pass
        return future


@pytest.mark.usefixtures("driver", "_default_sigint")
def test_sigint_that_the_kernel_gives_to_another_thread_keeps_the_readings(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine_host, "ThreadPoolExecutor", InterruptedPool)
    interrupt = "os.kill(os.getppid(), signal.SIGINT); sys.stdin.read()"
    validation = validate(changed_in("memory", interrupt, turns="turn == 3"), soak=3600.0, rounds=9)
    assert validation.run.validation is not None
    assert {item.probe for item in validation.run.validation.readings if item.round == 2} == {"product", "copy"}


@pytest.mark.usefixtures("driver")
def test_worker_started_to_repeat_a_phase_also_runs_the_next_soak_rounds(
    validate: Callable[..., HostValidation],
) -> None:
    # Like the real worker, this one is killed by the kernel when the thread that started it ends (prctl 1).
    bound = "import ctypes\nctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    validation = validate(
        bound + changed_in("memory", "values['fault'] = 'wrong'", turns="turn == 2"), soak=1.0, rounds=4
    )
    assert validation.run.validation is not None
    readings = validation.run.validation.readings
    assert not [item for item in readings if item.name == PROCESS]
    assert {item.round for item in readings if item.probe == "sustained"} >= {1, 2, 3, 4}


def test_validation_without_a_driver_library_could_not_judge(validate: Callable[..., HostValidation]) -> None:
    # Without the fixture `driver`, the real pynvml is used, which finds no driver.
    validation = validate()
    assert verdict.exit_code(validation.run.verdict) is Exit.NOT_JUDGED
    assert [item.state for item in judgements_of(validation, "driver-hidden")] == [OPEN]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("visible", "is_lost"), [(None, True), ("0", False)])
def test_gpu_with_a_device_node_that_torch_does_not_list_fails_unless_a_variable_hides_it(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch, visible: str | None, is_lost: bool
) -> None:
    nodes = tuple(DeviceNode(name) for name in ("nvidia0", "nvidia1", "nvidiactl"))
    monkeypatch.setattr(diagnosis, "read_visibility", lambda: GpuVisibility(loaded=True, nodes=nodes, visible=visible))
    validation = validate()
    assert validation.run.verdict.state is (FAIL if is_lost else PASS)
    messages = [item.said for item in judgements_of(validation, "unusable")]
    assert ["but torch lists 1" in message for message in messages] == [True] * is_lost


def test_gpu_that_torch_cannot_use_fails_with_the_cause_and_no_phase_runs(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(facts.probe(), gpus=(Gpu("NVIDIA H100 80GB HBM3", "9.0"),), nvidia_driver="570.86.15")
    monkeypatch.setattr(facts, "probe", lambda: machine)
    validation = validate("COUNT = 0\nFOUND |= {'cuda': None, 'available': False}\n")
    assert verdict.exit_code(validation.run.verdict) is Exit.VERDICT_FAIL
    (unusable,) = judgements_of(validation, "unusable")
    assert "CPU-only build" in unusable.said
    assert "provision env create --variant cu" in unusable.said
    assert not Path("phases").exists()


@pytest.mark.usefixtures("driver")
def test_run_is_stored_in_the_results_if_the_history_cannot_be_written(
    validate: Callable[..., HostValidation], tmp_path: Path
) -> None:
    place = suite_run.find_root(request.RunRequest(suite="", out=tmp_path, root=str(tmp_path))).validations
    place.parent.mkdir(parents=True)
    place.touch()
    validation = validate()
    assert store.load("", tmp_path / "out") == validation.run
    assert any("not stored on the volume" in note for note in validation.notes)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("30m", 1800.0), ("1.5h", 5400.0)])
def test_soak_time_is_parsed_as_seconds_minutes_or_hours(text: str, seconds: float) -> None:
    assert examine_host.parse_soak(text) == seconds
    assert examine_host.parse_soak(None) is None


@pytest.mark.parametrize("text", ["", "m", "0", "-5m", "1d", "nan"])
def test_invalid_soak_time_is_rejected(text: str) -> None:
    with pytest.raises(SpecError, match="such as 30m"):
        examine_host.parse_soak(text)


def test_validation_under_an_interpreter_without_torch_is_a_blocked_error(
    validate: Callable[..., HostValidation],
) -> None:
    with pytest.raises(BlockedError, match=r"torch does not start(.|\n)*no module here"):
        validate("raise SystemExit('no module here')\n")


def test_validation_of_mps_is_rejected_with_the_command_that_measures_it(
    validate: Callable[..., HostValidation], tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="bench run --device mps"):
        validate(device="mps")
    assert not (tmp_path / "out").exists()
