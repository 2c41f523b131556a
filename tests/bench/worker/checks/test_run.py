"""The probes of a device with real torch: what they find on a well one, and each fault that is planted."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import protocol
from bench.core.codec import record
from bench.core.result import Host
from bench.core.validation_records import CUT, UNABLE, Reading
from bench.run import cases
from bench.worker.checks import device as checked_device
from bench.worker.checks import run, sampling_speed
from tests.bench import processor_clocks
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DTYPES = ("fp32", "bf16", "fp16")
pytestmark = pytest.mark.worker


@pytest.fixture(scope="module")
def asked(measured_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that examine_devices.py tells, of one process."""
    folder = tmp_path_factory.mktemp("examined")
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    script = CHECKOUT / "tests/bench/examine_devices.py"
    done = subprocess.run(
        [measured_python, script], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def readings(told: list[Any]) -> list[Reading]:
    return [record(each, Reading, "reading") for each in told]


def only(told: list[Any]) -> Reading:
    (reading,) = readings(told)
    return reading


def test_a_well_device_is_right_in_each_dtype(asked: dict[str, Any]) -> None:
    found = readings(asked["numbers"]["well"])
    names = [f"{what} {dtype}" for dtype in DTYPES for what in ("matrix product", "convolution", "attention")]
    assert [each.name for each in found] == names
    for reading in found:
        assert (reading.fault, reading.why_not) == (None, None)
        assert reading.value is not None
        assert reading.limit is not None
        # A limit that is far off would find nothing.
        assert reading.limit / 200 < reading.value < reading.limit / 2


def test_an_fp8_product_is_right(asked: dict[str, Any]) -> None:
    reading = only([asked["numbers"]["fp8"]])
    assert (reading.fault, reading.why_not) == (None, None)
    assert 0 < (reading.value or 0.0) < (reading.limit or 0.0) / 2


def test_a_limit_tells_dtypes_apart(asked: dict[str, Any]) -> None:
    """What is computed in bf16 or TF32 is not taken for fp32."""
    limits = {each.name: each.limit or 0.0 for each in readings(asked["numbers"]["well"])}
    for what in ("matrix product", "convolution", "attention"):
        assert limits[f"{what} fp32"] < 2.0**-13 < limits[f"{what} fp16"] < limits[f"{what} bf16"]


def test_a_single_wrong_number_is_found(asked: dict[str, Any]) -> None:
    found = readings(asked["numbers"]["one off"])
    assert [each.name for each in found] == [f"matrix product {dtype}" for dtype in DTYPES]
    for reading in found:
        is_far = (reading.value or 0.0) > (reading.limit or 0.0)
        assert is_far or "one of 65536 numbers is off by 1 times" in (reading.fault or "")
    assert found[1].fault is not None, "in bf16 one number hides in the distance of all"


def test_no_number_and_a_wrong_scale_are_found(asked: dict[str, Any]) -> None:
    for reading in readings(asked["numbers"]["NaN"]):
        assert (reading.value, reading.fault) == (None, "the result contains NaN or infinity")
    for reading in readings(asked["numbers"]["all off"]):
        assert reading.value == pytest.approx(0.05, rel=0.01)
        assert (reading.value or 0.0) > (reading.limit or 1.0)


def test_memory_is_written_with_each_pattern_before_it_is_looked_at(asked: dict[str, Any]) -> None:
    reading = only(asked["memories"]["well"])
    assert (reading.fault, reading.why_not) == (None, None)
    assert reading.value == 0.5
    assert reading.figures == {"tested_bytes": 32 << 20, "free_bytes": 64 << 20, "errors": 0, "patterns": 4}
    # An address has a value of its own in each word, a constant one.
    assert asked["memories"]["written"] == [
        ["own address", 1000, 4 << 20],
        ["own address inverted", 1000, 4 << 20],
        ["0x55", 1, 4 << 20],
        ["0xAA", 1, 4 << 20],
    ]


def test_a_flipped_bit_is_found(asked: dict[str, Any]) -> None:
    reading = only(asked["memories"]["flipped"])
    place = ((1 << 20) + 7) * 8
    assert f"8 bytes: 4; the first is at byte {place} of" in (reading.fault or "")
    assert "bits 17 flipped, pattern: own address" in (reading.fault or "")
    assert reading.figures["errors"] == 4
    once = only(asked["memories"]["flipped in one"])
    assert "8 bytes: 1; the first is at byte 24 of" in (once.fault or "")
    assert "bits 63 flipped, pattern: 0xAA" in (once.fault or "")


def test_an_address_line_that_is_stuck_is_found(asked: dict[str, Any]) -> None:
    reading = only(asked["memories"]["aliased"])
    assert reading.figures["errors"] == 2 * (1 << 19), "each word that was written over, in both patterns of addresses"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("small", "only 1048576 bytes are free"),
        ("untold", "the amount of free memory is unknown"),
        ("late", checked_device.NO_TIME),
    ],
)
def test_memory_that_cannot_be_tested_says_why(asked: dict[str, Any], name: str, why: str) -> None:
    reading = only(asked["memories"][name])
    assert (reading.value, reading.fault, reading.why_not) == (None, None, why)


def test_memory_says_how_many_patterns_there_was_time_for(asked: dict[str, Any]) -> None:
    reading = only(asked["memories"]["slow"])
    assert (reading.fault, reading.figures["patterns"], reading.figures["errors"]) == (None, 1, 0)


@pytest.mark.parametrize(
    ("name", "best", "of", "is_cut"),
    [
        ("second", 10.0, 100, False),
        ("third has no room", 10.0, 100, True),
        ("it grows no more", 100 / 9.8, 100, False),
        ("second has no time", 5.0, 10, True),
    ],
)
def test_the_fastest_way_is_kept(asked: dict[str, Any], name: str, best: float, of: float, is_cut: bool) -> None:
    """And where a larger one was left out, it says that there may be a faster one."""
    reading = only([asked["ways"][name]])
    assert (reading.value, reading.figures) == (best, {"amount": of} | ({CUT: 1.0} if is_cut else {}))
    assert set(reading.samples) == {best}


def test_a_way_for_which_there_is_no_room_or_time_is_not_tried(asked: dict[str, Any]) -> None:
    assert only([asked["ways"]["no room"]]).why_not == "there is not enough free memory"
    assert only([asked["ways"]["no time"]]).why_not == checked_device.NO_TIME
    assert asked["ways"]["asked in no time"] == 0


@pytest.mark.parametrize("name", ["no room", "no kernel", "no time", "no package"])
def test_what_is_not_to_be_had_is_no_fault(asked: dict[str, Any], name: str) -> None:
    reading = only([asked["stopped"][name]])
    assert (reading.value, reading.fault) == (None, None)
    assert reading.why_not
    assert (UNABLE in reading.figures) is (name == "no kernel")


@pytest.mark.parametrize(
    ("said", "is_well"),
    [
        # As CUDA, cuDNN and torch say it.
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", True),
        ("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.", True),
        ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", True),
        ("CUDA error: no kernel image is available for execution on the device", True),
        ("CUDA error: uncorrectable ECC error encountered", False),
        ("CUDA error: unspecified launch failure", False),
    ],
)
def test_what_a_library_or_another_process_refuses_is_no_fault_of_the_card(said: str, is_well: bool) -> None:
    found = checked_device.stopped(Reading("product", "product bf16", "cuda:0", "FLOP/s", None), RuntimeError(said))
    assert (found.fault is None) is is_well
    assert (found.why_not is None) is not is_well


@pytest.mark.parametrize(("name", "said"), [("broken", "CUDA error: an illegal"), ("wrong shape", "mat1 and mat2")])
def test_an_error_while_it_computes_is_a_fault(asked: dict[str, Any], name: str, said: str) -> None:
    reading = only([asked["stopped"][name]])
    assert (reading.value, reading.why_not) == (None, None)
    assert (reading.fault or "").startswith(said)
    assert "\n" not in (reading.fault or "")


@pytest.mark.parametrize(
    ("probe", "figures"),
    [("product", {"m", "n", "k"}), ("convolution", {"batch", "channels", "side", "channels_last"})],
)
def test_a_rate_comes_with_its_shape_and_samples(asked: dict[str, Any], probe: str, figures: set[str]) -> None:
    found = readings(asked[probe])
    assert [each.name for each in found] == [f"{probe} {dtype}" for dtype in DTYPES]
    for reading in found:
        assert (reading.probe, reading.unit, reading.fault) == (probe, "FLOP/s", None)
        assert reading.value == max(reading.samples)
        assert set(reading.figures) - {CUT} == figures


def test_a_copy_counts_what_is_read_and_written(asked: dict[str, Any]) -> None:
    reading = only(asked["copy"])
    assert (reading.name, reading.unit, reading.figures) == ("copy", "B/s", {"bytes": 256 << 20})
    assert reading.value == max(reading.samples)
    assert 1e8 < reading.value < 1e13


def test_a_load_that_repeats_itself_is_well(asked: dict[str, Any]) -> None:
    reading = only(asked["sustained"])
    assert (reading.name, reading.unit, reading.fault) == ("sustained fp32", "FLOP/s", None)
    assert set(reading.figures) == {"first_quarter", "last_quarter", "unequal"}
    assert reading.figures["unequal"] == 0
    assert min(reading.samples) <= (reading.value or 0.0) <= max(reading.samples)


def test_a_burst_that_differs_in_one_bit_is_found(asked: dict[str, Any]) -> None:
    reading = only(asked["burst"])
    bursts = len(reading.samples)
    assert bursts >= 3
    assert reading.figures["unequal"] == bursts // 3
    assert reading.fault == f"{bursts // 3} of {bursts} bursts differ from the first result"


def test_no_question_is_begun_when_the_time_is_over(asked: dict[str, Any]) -> None:
    for reading in readings([each for found in asked["late"] for each in found]):
        assert (reading.value, reading.why_not) == (None, checked_device.NO_TIME)


def test_threads_are_told_in_relation_to_one(asked: dict[str, Any]) -> None:
    reading = only(asked["threads"])
    assert reading.name == "scaling"
    rates = {int(count): rate for count, rate in reading.figures.items()}
    most = max(rates)
    assert min(rates) == 1
    assert reading.value == pytest.approx(rates[most] / rates[1] / most)
    assert asked["threads after"], "it leaves torch's own number"
    assert only(asked["thread"]).why_not == "torch uses only one thread"


def test_loops_tell_seconds_a_step(asked: dict[str, Any]) -> None:
    found = readings(asked["loops"]["well"])
    kinds = ("tiny-ddpm fp32", "tiny-sd bf16")
    assert [each.name for each in found] == [f"loop {kind} batch {batch}" for kind in kinds for batch in (1, 4)]
    for reading in found:
        assert (reading.unit, reading.fault, reading.why_not) == ("s", None, None)
        assert len(reading.samples) == reading.figures["steps"] >= 3
        assert min(reading.samples) <= (reading.value or 0.0) <= max(reading.samples)
    flops = [(each.value or 0.0) * each.figures["flops_per_second"] for each in found]
    assert flops[1] == pytest.approx(4 * flops[0])


def test_an_image_that_is_no_number_is_found(asked: dict[str, Any]) -> None:
    for reading in readings(asked["loops"]["poisoned"]):
        assert (reading.value, reading.fault) == (None, "the image contains NaN or infinity")


@pytest.mark.parametrize(
    ("name", "why"),
    [("late", "building the model takes"), ("no time", "a step takes about"), ("no room", "the weights take")],
)
def test_a_loop_that_is_not_asked_says_its_price(asked: dict[str, Any], name: str, why: str) -> None:
    found = readings(asked["loops"][name])
    assert found
    for reading in found:
        assert (reading.value, reading.fault) == (None, None)
        assert why in (reading.why_not or "")


def test_a_wrong_sum_of_ranks_is_found(asked: dict[str, Any]) -> None:
    assert asked["sums"] == [True, False]


def test_the_loops_are_those_of_the_suites() -> None:
    for device, kinds in (("cpu", sampling_speed.ON_A_CPU), ("cuda:0", sampling_speed.ON_A_CARD)):
        for kind in kinds:
            means = cases.Capabilities(lower=None if kind.dtype == "fp32" else kind.dtype)
            known = [cell.case for cell in cases.unroll(cases.load_suite("quick"), device, means=means)]
            assert any(kind.case(device, 1, case.steps) == case for case in known), kind


def test_the_parts_of_the_time_are_all_of_it() -> None:
    assert tuple(run.CHECKS) == protocol.PHASES, "what the parent may ask for"
    assert sum(phase.on_a_cpu for phase in run.CHECKS.values()) == 100
    assert sum(phase.on_a_card for phase in run.CHECKS.values()) == 100


def phases(events: list[Any]) -> list[str]:
    return [event["phase"] for event in events if "phase" in event]


def test_an_examination_asks_what_is_wanted_and_again_at_a_word(asked: dict[str, Any]) -> None:
    events = asked["examined"]["events"]
    # In the plan's order; what a CPU has not sends no event; after another word nothing is asked.
    assert phases(events) == ["imports", "numerics", "copy", "waiting", "copy", "threads", "waiting"]
    probes = [event["reading"]["probe"] for event in events if "reading" in event]
    assert probes == ["numerics"] * 9 + ["copy"] * 2 + ["threads"]
    first, answer = (event["examined"] for event in events if "examined" in event)
    assert set(first["seconds"]) == {"imports", "numerics", "copy"}, "the report comes whenever all was asked"
    assert set(answer["seconds"]) == {"imports", "numerics", "copy", "threads"}
    assert {"python", "torch", "diffusers", "cpu"} == set(answer["software"])
    assert record(answer["host"], Host, "host").threads >= 1
    assert asked["examined"]["refused"].startswith("there is no phase 'heat'; there is: numerics,")


def test_a_card_that_another_process_holds_alone_is_not_asked(asked: dict[str, Any]) -> None:
    events = asked["examined"]["taken"]
    assert phases(events) == ["imports", "waiting", "waiting"]
    reading = only([event["reading"] for event in events if "reading" in event])
    assert (reading.value, reading.fault) == (None, None)
    assert "busy or unavailable" in (reading.why_not or "")


def test_a_phase_that_breaks_keeps_what_it_has_found(asked: dict[str, Any]) -> None:
    events = asked["examined"]["lost"]
    assert phases(events) == ["imports", "numerics", "copy", "waiting"]
    good, broken = (
        only([event["reading"]]) for event in events if "reading" in event and event["reading"]["probe"] == "copy"
    )
    assert good.value is not None
    assert (broken.value, broken.fault) == (None, "CUDA error: the device was lost")
    assert "copy" in events[-2]["examined"]["seconds"]


@pytest.fixture
def worker(measured_python: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A real worker, as the parent starts it; its budget is processor time."""
    with subprocess.Popen(
        processor_clocks.worker_command(measured_python),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    ) as process:
        yield process
        process.kill()


def send(worker: subprocess.Popen[str], line: str) -> None:
    assert worker.stdin is not None
    worker.stdin.write(line + "\n")
    worker.stdin.flush()


def events_of(worker: subprocess.Popen[str]) -> list[Any]:
    """The worker's events until it waits, as its lines have them."""
    events: list[Any] = []
    assert worker.stdout is not None
    for line in worker.stdout:
        events.append(json.loads(line))
        if events[-1].get("phase") == "waiting":
            return events
    pytest.fail(f"it ended: {events}")


def test_a_real_worker_examines_its_device(worker: subprocess.Popen[str]) -> None:
    wanted = {"device": "cpu", "asked_at": 1e9, "budget_seconds": 8.0}
    send(worker, json.dumps({"examine": wanted | {"probes": ["numerics", "product", "copy", "memory", "sustained"]}}))
    events = events_of(worker)
    assert phases(events) == ["imports", "numerics", "product", "copy", "memory", "sustained", "waiting"]
    found = {each.name: each for each in readings([event["reading"] for event in events if "reading" in event])}
    assert not [each for each in found.values() if each.fault is not None]
    assert found["matrix product fp32"].value is not None
    assert found["product fp32"].value is not None
    send(worker, "again 1 copy")
    again = events_of(worker)
    assert phases(again) == ["copy", "waiting"]
    assert worker.stdin is not None
    worker.stdin.close()
    answer = again[-2]["examined"]
    assert record(answer["host"], Host, "host").cpu_share is not None
    assert worker.wait() == 0
