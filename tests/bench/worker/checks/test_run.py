"""Tests the checks of a device with real torch, on a correct device and on devices with simulated faults."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import worker_requests
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
def results(measured_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run examine_devices.py, which makes all checks in one process, and return its results: {name: readings}."""
    folder = tmp_path_factory.mktemp("examined")
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    script = CHECKOUT / "tests/bench/examine_devices.py"
    done = subprocess.run(
        [measured_python, script], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def readings(items: list[Any]) -> list[Reading]:
    """Return the readings that dicts of JSON describe."""
    return [record(item, Reading, "reading") for item in items]


def only(items: list[Any]) -> Reading:
    """Return the only reading of a list; fail if the list has another length than 1."""
    (reading,) = readings(items)
    return reading


def test_error_of_a_correct_device_is_within_the_limit_in_each_dtype(results: dict[str, Any]) -> None:
    all_readings = readings(results["numbers"]["well"])
    names = [f"{name} {dtype}" for dtype in DTYPES for name in ("matrix product", "convolution", "attention")]
    assert [reading.name for reading in all_readings] == names
    for reading in all_readings:
        assert (reading.fault, reading.why_not) == (None, None)
        assert reading.value is not None
        assert reading.limit is not None
        # A limit far above the error would find no fault.
        assert reading.limit / 200 < reading.value < reading.limit / 2


def test_error_of_a_correct_fp8_product_is_within_the_limit(results: dict[str, Any]) -> None:
    reading = only([results["numbers"]["fp8"]])
    assert (reading.fault, reading.why_not) == (None, None)
    assert 0 < (reading.value or 0.0) < (reading.limit or 0.0) / 2


def test_limit_of_fp32_is_below_the_error_of_bf16_and_tf32(results: dict[str, Any]) -> None:
    """A result that was computed in bf16 or TF32 instead of fp32 must exceed the limit."""
    limits = {reading.name: reading.limit or 0.0 for reading in readings(results["numbers"]["well"])}
    for name in ("matrix product", "convolution", "attention"):
        assert limits[f"{name} fp32"] < 2.0**-13 < limits[f"{name} fp16"] < limits[f"{name} bf16"]


def test_product_with_a_single_wrong_number_is_found_in_each_dtype(results: dict[str, Any]) -> None:
    products = readings(results["numbers"]["one off"])
    assert [reading.name for reading in products] == [f"matrix product {dtype}" for dtype in DTYPES]
    for reading in products:
        is_far = (reading.value or 0.0) > (reading.limit or 0.0)
        assert is_far or "one of 65536 numbers differs by 1 times" in (reading.fault or "")
    assert products[1].fault is not None, (
        "the error over all numbers is too small in bf16, so the single number is reported"
    )


def test_product_with_nan_is_a_fault_and_one_with_a_wrong_scale_exceeds_the_limit(results: dict[str, Any]) -> None:
    for reading in readings(results["numbers"]["NaN"]):
        assert (reading.value, reading.fault) == (None, "the result contains NaN or infinity")
    for reading in readings(results["numbers"]["all off"]):
        assert reading.value == pytest.approx(0.05, rel=0.01)
        assert (reading.value or 0.0) > (reading.limit or 1.0)


def test_memory_check_writes_four_patterns_to_half_of_the_free_memory(results: dict[str, Any]) -> None:
    reading = only(results["memories"]["well"])
    assert (reading.fault, reading.why_not) == (None, None)
    assert reading.value == 0.5
    assert reading.figures == {"tested_bytes": 32 << 20, "free_bytes": 64 << 20, "errors": 0, "patterns": 4}
    # The first 1000 words have 1000 different values in an address pattern, and one value in a constant pattern.
    assert results["memories"]["written"] == [
        ["own address", 1000, 4 << 20],
        ["own address inverted", 1000, 4 << 20],
        ["0x55", 1, 4 << 20],
        ["0xAA", 1, 4 << 20],
    ]


def test_memory_check_reports_a_flipped_bit_with_its_place_and_pattern(results: dict[str, Any]) -> None:
    reading = only(results["memories"]["flipped"])
    place = ((1 << 20) + 7) * 8
    assert f"8 bytes: 4; the first is at byte {place} of" in (reading.fault or "")
    assert "bits 17 flipped, pattern: own address" in (reading.fault or "")
    assert reading.figures["errors"] == 4
    once = only(results["memories"]["flipped in one"])
    assert "8 bytes: 1; the first is at byte 24 of" in (once.fault or "")
    assert "bits 63 flipped, pattern: 0xAA" in (once.fault or "")


def test_memory_check_finds_a_stuck_address_line(results: dict[str, Any]) -> None:
    reading = only(results["memories"]["aliased"])
    assert reading.figures["errors"] == 2 * (1 << 19), "each overwritten word, in both address patterns"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("small", "only 1048576 bytes are free"),
        ("unknown", "the amount of free memory is unknown"),
        ("late", checked_device.NO_TIME),
    ],
)
def test_memory_check_without_memory_or_time_has_a_reason_and_no_fault(
    results: dict[str, Any], name: str, why: str
) -> None:
    reading = only(results["memories"][name])
    assert (reading.value, reading.fault, reading.why_not) == (None, None, why)


def test_memory_check_counts_only_the_patterns_that_it_completed_in_time(results: dict[str, Any]) -> None:
    reading = only(results["memories"]["slow"])
    assert (reading.fault, reading.figures["patterns"], reading.figures["errors"]) == (None, 1, 0)


@pytest.mark.parametrize(
    ("name", "rate", "amount", "is_cut"),
    [
        ("second", 10.0, 100, False),
        ("third has no room", 10.0, 100, True),
        ("rate grows no more", 100 / 9.8, 100, False),
        ("second has no time", 5.0, 10, True),
    ],
)
def test_rate_is_that_of_the_fastest_variant_and_marked_if_a_larger_one_was_left_out(
    results: dict[str, Any], name: str, rate: float, amount: float, is_cut: bool
) -> None:
    """A larger variant, for which time or memory was missing, might have been faster."""
    reading = only([results["variants"][name]])
    assert (reading.value, reading.figures) == (rate, {"amount": amount} | ({CUT: 1.0} if is_cut else {}))
    assert set(reading.samples) == {rate}


def test_rate_without_memory_or_time_for_any_variant_has_a_reason(results: dict[str, Any]) -> None:
    assert only([results["variants"]["no room"]]).why_not == "there is not enough free memory"
    assert only([results["variants"]["no time"]]).why_not == checked_device.NO_TIME
    assert results["variants"]["calls in no time"] == 0


@pytest.mark.parametrize("name", ["no room", "no kernel", "no time", "no package"])
def test_error_for_lack_of_memory_kernel_time_or_package_is_no_fault(results: dict[str, Any], name: str) -> None:
    reading = only([results["stopped"][name]])
    assert (reading.value, reading.fault) == (None, None)
    assert reading.why_not
    assert (UNABLE in reading.figures) is (name == "no kernel")


@pytest.mark.parametrize(
    ("message", "is_correct"),
    [
        # (an error message of CUDA or cuDNN, whether the GPU may be correct)
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", True),
        ("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.", True),
        ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", True),
        ("CUDA error: no kernel image is available for execution on the device", True),
        ("CUDA error: uncorrectable ECC error encountered", False),
        ("CUDA error: unspecified launch failure", False),
    ],
)
def test_error_message_about_the_gpu_itself_is_a_fault_and_a_refusal_is_not(message: str, is_correct: bool) -> None:
    """A refusal is an error of a library, or of a GPU that another process uses."""
    reading = checked_device.with_error(
        Reading("product", "product bf16", "cuda:0", "FLOP/s", None), RuntimeError(message)
    )
    assert (reading.fault is None) is is_correct
    assert (reading.why_not is None) is not is_correct


@pytest.mark.parametrize(("name", "message"), [("broken", "CUDA error: an illegal"), ("wrong shape", "mat1 and mat2")])
def test_error_during_a_computation_is_a_fault(results: dict[str, Any], name: str, message: str) -> None:
    reading = only([results["stopped"][name]])
    assert (reading.value, reading.why_not) == (None, None)
    assert (reading.fault or "").startswith(message)
    assert "\n" not in (reading.fault or "")


@pytest.mark.parametrize(
    ("probe", "figures"),
    [("product", {"m", "n", "k"}), ("convolution", {"batch", "channels", "side", "channels_last"})],
)
def test_rate_reading_has_its_shape_and_samples(results: dict[str, Any], probe: str, figures: set[str]) -> None:
    rates = readings(results[probe])
    assert [reading.name for reading in rates] == [f"{probe} {dtype}" for dtype in DTYPES]
    for reading in rates:
        assert (reading.probe, reading.unit, reading.fault) == (probe, "FLOP/s", None)
        assert reading.value == max(reading.samples)
        assert set(reading.figures) - {CUT} == figures


def test_copy_check_of_256_mib_reports_a_plausible_rate(results: dict[str, Any]) -> None:
    reading = only(results["copy"])
    assert (reading.name, reading.unit, reading.figures) == ("copy", "B/s", {"bytes": 256 << 20})
    assert reading.value == max(reading.samples)
    assert 1e8 < reading.value < 1e13


def test_sustained_load_with_equal_results_has_no_fault(results: dict[str, Any]) -> None:
    reading = only(results["sustained"])
    assert (reading.name, reading.unit, reading.fault) == ("sustained fp32", "FLOP/s", None)
    assert set(reading.figures) == {"first_quarter", "last_quarter", "unequal"}
    assert reading.figures["unequal"] == 0
    assert min(reading.samples) <= (reading.value or 0.0) <= max(reading.samples)


def test_sustained_load_counts_the_bursts_that_differ_in_one_bit(results: dict[str, Any]) -> None:
    reading = only(results["burst"])
    bursts = len(reading.samples)
    assert bursts >= 3
    assert reading.figures["unequal"] == bursts // 3
    assert reading.fault == f"{bursts // 3} of {bursts} bursts differ from the first result"


def test_check_after_the_time_limit_has_no_value_and_the_reason(results: dict[str, Any]) -> None:
    for reading in readings([item for items in results["late"] for item in items]):
        assert (reading.value, reading.why_not) == (None, checked_device.NO_TIME)


def test_scaling_is_the_rate_of_all_threads_relative_to_one_thread(results: dict[str, Any]) -> None:
    reading = only(results["threads"])
    assert reading.name == "scaling"
    rates = {int(count): rate for count, rate in reading.figures.items()}
    most = max(rates)
    assert min(rates) == 1
    assert reading.value == pytest.approx(rates[most] / rates[1] / most)
    assert results["threads after"], "the number of torch's threads is not restored"
    assert only(results["thread"]).why_not == "torch uses only one thread"


def test_loop_check_reports_the_seconds_of_a_step_for_each_batch_size(results: dict[str, Any]) -> None:
    loops = readings(results["loops"]["well"])
    kinds = ("tiny-ddpm fp32", "tiny-sd bf16")
    assert [reading.name for reading in loops] == [f"loop {kind} batch {batch}" for kind in kinds for batch in (1, 4)]
    for reading in loops:
        assert (reading.unit, reading.fault, reading.why_not) == ("s", None, None)
        assert len(reading.samples) == reading.figures["steps"] >= 3
        assert min(reading.samples) <= (reading.value or 0.0) <= max(reading.samples)
    flops = [(reading.value or 0.0) * reading.figures["flops_per_second"] for reading in loops]
    assert flops[1] == pytest.approx(4 * flops[0])


def test_loop_check_whose_image_has_nan_is_a_fault(results: dict[str, Any]) -> None:
    for reading in readings(results["loops"]["poisoned"]):
        assert (reading.value, reading.fault) == (None, "the image contains NaN or infinity")


@pytest.mark.parametrize(
    ("name", "why"),
    [("late", "building the model takes"), ("no time", "a step takes about"), ("no room", "the weights take")],
)
def test_skipped_loop_check_says_which_time_or_memory_it_lacks(results: dict[str, Any], name: str, why: str) -> None:
    loops = readings(results["loops"][name])
    assert loops
    for reading in loops:
        assert (reading.value, reading.fault) == (None, None)
        assert why in (reading.why_not or "")


def test_link_check_accepts_the_right_sum_and_rejects_a_wrong_one(results: dict[str, Any]) -> None:
    assert results["sums"] == [True, False]


def test_loop_check_measures_cases_of_the_quick_suite() -> None:
    for device, kinds in (("cpu", sampling_speed.ON_A_CPU), ("cuda:0", sampling_speed.ON_A_CARD)):
        for kind in kinds:
            capabilities = cases.Capabilities(lower=None if kind.dtype == "fp32" else kind.dtype)
            quick = [cell.case for cell in cases.unroll(cases.load_suite("quick"), device, capabilities=capabilities)]
            assert any(kind.case(device, 1, case.steps) == case for case in quick), kind


def test_time_shares_of_all_phases_add_up_to_100_percent() -> None:
    assert tuple(run.CHECKS) == worker_requests.PHASES, "what the parent may ask for"
    assert sum(phase.cpu_parts for phase in run.CHECKS.values()) == 100
    assert sum(phase.gpu_parts for phase in run.CHECKS.values()) == 100


def phases(events: list[Any]) -> list[str]:
    """Return the names of the phases in a list of events, in order."""
    return [event["phase"] for event in events if "phase" in event]


def test_examination_runs_the_requested_phases_and_repeats_them_on_request(results: dict[str, Any]) -> None:
    events = results["examined"]["events"]
    # Phases run in the order of protocol.PHASES. "pinned" sends no event on a CPU. A line without "again" ends the
    # examination.
    assert phases(events) == ["imports", "numerics", "copy", "waiting", "copy", "threads", "waiting"]
    probes = [event["reading"]["probe"] for event in events if "reading" in event]
    assert probes == ["numerics"] * 9 + ["copy"] * 2 + ["threads"]
    first, answer = (event["examined"] for event in events if "examined" in event)
    assert set(first["seconds"]) == {"imports", "numerics", "copy"}, "a report follows the last phase of each request"
    assert set(answer["seconds"]) == {"imports", "numerics", "copy", "threads"}
    assert {"python", "torch", "diffusers", "cpu"} == set(answer["software"])
    assert record(answer["host"], Host, "host").threads >= 1
    assert results["examined"]["refused"].startswith("there is no phase 'heat'; the phases are: numerics,")


def test_gpu_that_another_process_uses_exclusively_has_a_reason_and_no_fault(results: dict[str, Any]) -> None:
    events = results["examined"]["busy"]
    assert phases(events) == ["imports", "waiting", "waiting"]
    reading = only([event["reading"] for event in events if "reading" in event])
    assert (reading.value, reading.fault) == (None, None)
    assert "busy or unavailable" in (reading.why_not or "")


def test_phase_that_fails_keeps_the_readings_before_the_failure(results: dict[str, Any]) -> None:
    events = results["examined"]["lost"]
    assert phases(events) == ["imports", "numerics", "copy", "waiting"]
    good, broken = (
        only([event["reading"]]) for event in events if "reading" in event and event["reading"]["probe"] == "copy"
    )
    assert good.value is not None
    assert (broken.value, broken.fault) == (None, "CUDA error: the device was lost")
    assert "copy" in events[-2]["examined"]["seconds"]


@pytest.fixture
def worker(measured_python: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the real worker with clocks that count CPU time."""
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
    """Write a line to the stdin of the worker."""
    assert worker.stdin is not None
    worker.stdin.write(line + "\n")
    worker.stdin.flush()


def events_of(worker: subprocess.Popen[str]) -> list[Any]:
    """Read the events of the worker, as dicts, until it waits for the next line, and return them."""
    events: list[Any] = []
    assert worker.stdout is not None
    for line in worker.stdout:
        events.append(json.loads(line))
        if events[-1].get("phase") == "waiting":
            return events
    pytest.fail(f"the worker ended; its events: {events}")


def test_real_worker_examines_the_cpu_and_repeats_a_phase_on_request(worker: subprocess.Popen[str]) -> None:
    request = {"device": "cpu", "asked_at": 1e9, "budget_seconds": 8.0}
    send(worker, json.dumps({"examine": request | {"probes": ["numerics", "product", "copy", "memory", "sustained"]}}))
    events = events_of(worker)
    assert phases(events) == ["imports", "numerics", "product", "copy", "memory", "sustained", "waiting"]
    by_name = {reading.name: reading for reading in readings([item["reading"] for item in events if "reading" in item])}
    assert not [reading for reading in by_name.values() if reading.fault is not None]
    assert by_name["matrix product fp32"].value is not None
    assert by_name["product fp32"].value is not None
    send(worker, "again 1 copy")
    again = events_of(worker)
    assert phases(again) == ["copy", "waiting"]
    assert worker.stdin is not None
    worker.stdin.close()
    answer = again[-2]["examined"]
    assert record(answer["host"], Host, "host").cpu_share is not None
    assert worker.wait() == 0
