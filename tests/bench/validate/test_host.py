"""A whole validation, with a program in the worker's place and a card's answers in its driver's."""

from __future__ import annotations

import signal
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.errors import Exit
from bench.core.validation_records import PROCESS
from bench.gpu import diagnosis
from bench.gpu.device_nodes import DeviceNode, GpuVisibility
from bench.run import request, store, suite_run, verdict
from bench.validate import device, history, host
from provision.core.errors import BlockedError, SpecError
from provision.host import facts
from provision.host.facts import Gpu
from tests.bench.fake_examiner import FAIL, OPEN, PASS, TWO, WARN, asked, judged, planted

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.validation_records import VerdictState
    from bench.validate.host import HostValidation
    from tests.bench.fake_workers import Quiet


@pytest.mark.usefixtures("driver")
def test_a_healthy_card_passes_and_is_kept_twice(validate: Callable[..., HostValidation], tmp_path: Path) -> None:
    found = validate()
    assert found.run.verdict.state is PASS, found.run.verdict.reasons
    assert verdict.exit_of(found.run.verdict) is Exit.GOOD
    assert store.load("", tmp_path / "out") == found.run
    assert history.load(
        suite_run.find_root(request.RunRequest(suite="", out=tmp_path, root=str(tmp_path))).validations
    ).runs == (found.run,)
    (product,) = judged(found, "product")
    assert (product.state, product.expected, product.confidence) == (PASS, 794.5e12, "measured")
    (card,) = found.run.validation.cards if found.run.validation else ()
    assert (card.uuid, card.driver_sees, card.power_limit_watts) == (
        "GPU-00000000-0000-0000-0000-000000000090",
        True,
        700,
    )
    assert len(asked()) == 7, "nothing was asked again"


@pytest.mark.usefixtures("driver")
def test_its_own_best_is_what_a_card_is_held_against(validate: Callable[..., HostValidation]) -> None:
    validate()
    (later,) = judged(validate(planted("loop", "values['step'] = 0.03")), "loop")
    assert (later.state, later.expected, later.confidence) == (WARN, 0.02, "own")
    assert "its own best, run" in later.said
    assert asked()[14:] == ["cuda:0 loop"], "and asked again for that"


@pytest.mark.usefixtures("driver")
def test_a_slow_card_is_asked_again_before_it_fails(validate: Callable[..., HostValidation]) -> None:
    found = validate(planted("product", "values['product'] = 300 * T"))
    assert verdict.exit_of(found.run.verdict) is Exit.VERDICT_FAIL
    assert asked()[7:] == ["cuda:0 product"]
    (product,) = judged(found, "product")
    assert product.state is FAIL
    assert "300.0 TFLOP/s is 38% of the 794.5 TFLOP/s" in product.said
    assert "ticket" in product.advice


@pytest.mark.usefixtures("driver")
def test_a_card_that_is_slow_once_is_not_slow(validate: Callable[..., HostValidation]) -> None:
    found = validate(planted("product", "values['product'] = 300 * T", turns="turn == 1"))
    assert found.run.verdict.state is PASS
    assert found.run.validation is not None
    assert [each.value for each in found.run.validation.readings if each.probe == "product"] == [780e12]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("turns", "state"), [("True", FAIL), ("turn == 1", WARN)])
def test_a_flipped_bit(validate: Callable[..., HostValidation], turns: str, state: VerdictState) -> None:
    found = validate(planted("memory", "values['fault'] = '1 word of 8 bytes did not come back'", turns=turns))
    assert found.run.verdict.state is state
    assert "memory" in found.run.verdict.reasons[0]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("turns", "state"), [("True", FAIL), ("turn == 1", WARN)])
def test_a_wrong_product(validate: Callable[..., HostValidation], turns: str, state: VerdictState) -> None:
    found = validate(planted("numerics", "values['error'] = 0.3", turns=turns))
    assert found.run.verdict.state is state
    assert asked()[7:] == ["cuda:0 numerics"]


@pytest.mark.usefixtures("driver")
def test_of_two_cards_the_slowest_is_named(validate: Callable[..., HostValidation], progress: Quiet) -> None:
    slower = "    if device == 'cuda:1' and phase == 'product': values['product'] = 640 * T\n"
    found = validate(f"{TWO}def before(phase, turn, values):\n{slower}")
    (slowest,) = judged(found, "slowest")
    assert (slowest.state, slowest.device) == (WARN, "cuda:1")
    assert found.run.validation is not None
    probes = {each.probe for each in found.run.validation.readings}
    assert {"together", "links"} <= probes
    assert any(line.strip().startswith("all at once") for line in progress.lines)


@pytest.mark.usefixtures("driver")
def test_a_host_that_does_not_feed_all_its_cards(validate: Callable[..., HostValidation]) -> None:
    """Alone each reaches 780 TFLOP/s; all at once, the second time that they are asked, 600."""
    found = validate(TWO + planted("product", "values['product'] = 600 * T", turns="turn == 2"))
    assert {each.device for each in judged(found, "together") if each.state is WARN} == {"cuda:0", "cuda:1"}


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("ends", "state"), [("True", FAIL), ("not Path('linked').exists()", WARN)])
def test_links_that_end_are_asked_again(
    validate: Callable[..., HostValidation], ends: str, state: VerdictState
) -> None:
    usual = "    say({'reading': plain(Reading('links', 'links', 'cuda:0', 'B/s', 1.0))})\n"
    found = validate(
        f"{TWO}def links():\n    ends = {ends}\n    Path('linked').touch()\n    if ends: os._exit(3)\n{usual}"
    )
    assert found.run.verdict.state is state
    assert ("(exit 3)" in found.run.verdict.reasons[0]) is (state is FAIL)


def test_all_devices_are_asked_for_as_long() -> None:
    assert host.plan_seconds(60.0, 1) == 48.0
    for count in (2, 8):
        plan = host.plan_seconds(60.0 + 40.0 * (count - 1), count)
        assert 25 < plan < 48
        assert plan * count < 60 + 40 * (count - 1)
    assert host.plan_seconds(1.0, 8) == 10.0, "less than a start tells nothing"


@pytest.mark.usefixtures("driver")
def test_a_soak_goes_on_round_after_round(validate: Callable[..., HostValidation]) -> None:
    faded = planted("product", "values['product'] = (780 - 100 * (turn > 2)) * T")
    found = validate(faded, soak=1.0, rounds=3)
    assert found.run.validation is not None
    rounds = {each.round for each in found.run.validation.readings}
    assert rounds == {0, 1, 2, 3}
    assert found.run.validation.soak_seconds is not None
    assert found.run.validation.soak_seconds >= 1
    (drift,) = judged(found, "drift")
    assert drift.state is WARN
    assert not found.interrupted


@pytest.mark.usefixtures("driver", "_signals_are_heard")
def test_ctrl_c_ends_a_soak_and_keeps_what_was_found(
    validate: Callable[..., HostValidation], tmp_path: Path, progress: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round is whole; in the second, with the card at work, somebody has seen enough."""
    interrupt = "os.kill(os.getppid(), signal.SIGINT); sys.stdin.read()"
    stopped = []
    usual = device.DeviceExamination.stop

    def stop(self: device.DeviceExamination) -> None:
        stopped.append(self.device)
        usual(self)

    monkeypatch.setattr(device.DeviceExamination, "stop", stop)
    found = validate(planted("memory", interrupt, turns="turn == 3"), soak=3600.0, rounds=9)
    assert stopped == ["cuda:0"], "nobody waits for the round's end"
    assert found.interrupted
    assert found.run.verdict.state is PASS
    assert store.load("", tmp_path / "out") == found.run
    assert found.run.validation is not None
    rounds = {(each.round, each.probe) for each in found.run.validation.readings if each.round}
    whole = {(1, probe) for probe in ("product", "copy", "memory", "sustained")}
    assert rounds == whole | {(2, "product"), (2, "copy")}, "and what the second had found"
    assert found.run.validation.software == {"torch": "2.13.0"}
    assert any("interrupted" in line for line in progress.lines)


class Interrupted(ThreadPoolExecutor):
    """Another thread of the process takes SIGINT: Python then raises it in the middle of what the main one does."""

    def submit(self, *words: Any, **named: Any) -> Future[Any]:
        future = super().submit(*words, **named)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while wait([future], 0.1).not_done:
            pass
        return future


@pytest.mark.usefixtures("driver", "_signals_are_heard")
def test_an_interrupt_that_another_thread_takes_loses_nothing(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "ThreadPoolExecutor", Interrupted)
    interrupt = "os.kill(os.getppid(), signal.SIGINT); sys.stdin.read()"
    found = validate(planted("memory", interrupt, turns="turn == 3"), soak=3600.0, rounds=9)
    assert found.run.validation is not None
    assert {each.probe for each in found.run.validation.readings if each.round == 2} == {"product", "copy"}


@pytest.mark.usefixtures("driver")
def test_a_worker_that_is_started_anew_lives_on_in_the_next_round(validate: Callable[..., HostValidation]) -> None:
    """The kernel ends a worker with the thread that has started it, as the real worker asks it to."""
    bound = "import ctypes\nctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    found = validate(bound + planted("memory", "values['fault'] = 'wrong'", turns="turn == 2"), soak=1.0, rounds=4)
    assert found.run.validation is not None
    readings = found.run.validation.readings
    assert not [each for each in readings if each.name == PROCESS]
    assert {each.round for each in readings if each.probe == "sustained"} >= {1, 2, 3, 4}


def test_a_hidden_driver_leaves_the_verdict_open(validate: Callable[..., HostValidation]) -> None:
    """There is none here: the real library says so."""
    found = validate()
    assert verdict.exit_of(found.run.verdict) is Exit.NOT_JUDGED
    assert [each.state for each in judged(found, "driver-hidden")] == [OPEN]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("visible", "is_lost"), [(None, True), ("0", False)])
def test_a_card_that_torch_lost_is_missed(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch, visible: str | None, is_lost: bool
) -> None:
    nodes = tuple(DeviceNode(name) for name in ("nvidia0", "nvidia1", "nvidiactl"))
    monkeypatch.setattr(diagnosis, "read_visibility", lambda: GpuVisibility(loaded=True, nodes=nodes, visible=visible))
    found = validate()
    assert found.run.verdict.state is (FAIL if is_lost else PASS)
    said = [each.said for each in judged(found, "unusable")]
    assert ["2 cards have a node that opens, and torch sees 1" in each for each in said] == [True] * is_lost


def test_a_card_that_torch_cannot_use_fails_with_its_cause(
    validate: Callable[..., HostValidation], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = replace(facts.probe(), gpus=(Gpu("NVIDIA H100 80GB HBM3", "9.0"),), nvidia_driver="570.86.15")
    monkeypatch.setattr(facts, "probe", lambda: known)
    found = validate("COUNT = 0\nFOUND |= {'cuda': None, 'available': False}\n")
    assert verdict.exit_of(found.run.verdict) is Exit.VERDICT_FAIL
    (unusable,) = judged(found, "unusable")
    assert "CPU-only build" in unusable.said
    assert "provision env create --variant cu" in unusable.said
    assert not Path("asked").exists()


@pytest.mark.usefixtures("driver")
def test_a_volume_that_takes_nothing_loses_no_result(validate: Callable[..., HostValidation], tmp_path: Path) -> None:
    place = suite_run.find_root(request.RunRequest(suite="", out=tmp_path, root=str(tmp_path))).validations
    place.parent.mkdir(parents=True)
    place.touch()
    found = validate()
    assert store.load("", tmp_path / "out") == found.run
    assert any("not kept on the volume" in note for note in found.notes)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("30m", 1800.0), ("1.5h", 5400.0)])
def test_how_long_a_soak_is(text: str, seconds: float) -> None:
    assert host.soak(text) == seconds
    assert host.soak(None) is None


@pytest.mark.parametrize("text", ["", "m", "0", "-5m", "1d", "nan"])
def test_no_time_is_no_soak(text: str) -> None:
    with pytest.raises(SpecError, match="such as 30m"):
        host.soak(text)


def test_a_torch_that_does_not_start_is_told(validate: Callable[..., HostValidation]) -> None:
    with pytest.raises(BlockedError, match=r"torch does not start(.|\n)*no module here"):
        validate("raise SystemExit('no module here')\n")


def test_an_apple_card_is_for_bench_run(validate: Callable[..., HostValidation], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="bench run --device mps"):
        validate(device="mps")
    assert not (tmp_path / "out").exists()
