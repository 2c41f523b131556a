"""Tests the sampling loops of every task and scheduler, and the checks after the samples; made by measure_cases.py."""

from __future__ import annotations

from typing import Any

import pytest

from bench.core import axes
from bench.core.codec import record
from bench.core.result import Result, Status
from tests.bench.conftest import result_of

LOOPS = {
    **{f"{model} {task}": 4 for model in ("tiny-sd", "tiny-sdxl") for task in ("text-to-image",)},
    **{f"{model} image-to-image": 3 for model in ("tiny-sd", "tiny-sdxl")},
    "tiny-inpainting inpainting": 4,
    "tiny-controlnet controlnet": 4,
    "tiny-ddpm unconditional": 4,
    # A second-order scheduler evaluates the model twice in every step but the last.
    "heun on a pipeline": 7,
    "kdpm2 written out": 7,
    "pndm on a pipeline": 5,
    "lcm on a pipeline": 4,
    "ddim half-way": 8,
    "heun half-way": 15,
    "pndm half-way": 9,
    "kdpm2-a half-way": 15,
    "dpmpp-2s half-way": 8,
}


@pytest.mark.worker
@pytest.mark.parametrize(("name", "evaluations"), LOOPS.items())
def test_sampling_loop_evaluates_the_model_as_often_as_predicted(
    found: dict[str, Any], name: str, evaluations: int
) -> None:
    loop = found["loops"][name]
    assert (loop["predicted"], loop["marks"]) == (evaluations, evaluations + 1)  # the loop also marks its beginning


@pytest.mark.worker
def test_every_task_scheduler_and_setting_makes_a_repeatable_image_or_is_skipped_with_a_reason(
    found: dict[str, Any],
) -> None:
    skipped = {name: loop["skipped"] for name, loop in found["loops"].items() if "skipped" in loop}
    for name, loop in found["loops"].items():
        if name in skipped:
            continue
        assert loop["shape"] == [2, 3, 64, 64], name
        assert loop["finite"], name
        assert 0 <= loop["low"] < loop["high"] <= 1, name
        assert loop["same"], f"{name}: the same seed gave another image"
        assert loop["is whole again"], name
        assert loop["predicted"] + 1 == loop["marks"], name
    # A setting that this CPU or the model does not have is skipped with its reason.
    assert {name: reason for name, reason in skipped.items() if "attention" not in name} == {
        "offload model": "offload model: only a pipeline on a CUDA device supports offloading",
        "vae of none": "vae tiling: tiny-ddpm has no VAE",
        "image-to-image of one step": "image-to-image at strength 0.8 leaves no step of 1; use more steps",
    }
    assert {name.split()[1] for name in skipped if name.startswith("attention")} == {"efficient", "cudnn"}
    assert set(axes.SCHEDULERS) == {name.split()[0] for name in found["loops"] if name.endswith("written out")} - {
        "attention"
    }


@pytest.mark.worker
def test_forced_attention_kernel_is_noted_if_it_takes_some_calls_and_skipped_if_none(found: dict[str, Any]) -> None:
    results = {name: record(item["result"], Result, name) for name, item in found["forced attention"].items()}
    assert {name: result.status for name, result in results.items()} == {
        "all": Status.OK, "some": Status.OK, "none": Status.SKIPPED, "missing": Status.SKIPPED,
    }  # fmt: skip
    assert results["all"].notes == ()
    assert results["some"].notes == (
        "attention flash rejects the vae's heads of size 16; another kernel computes them",
    )
    assert results["none"].reason == (
        "attention flash is not available on cpu in fp32: No available kernel. Aborting execution."
    )
    assert (results["missing"].reason or "").startswith("attention cudnn is not available on cpu in fp32: ")


@pytest.mark.worker
def test_time_of_each_component_of_a_pipeline_is_measured(found: dict[str, Any]) -> None:
    loops = found["loops"]
    assert set(loops["tiny-ddpm unconditional"]["parts"]) == {"unet", "scheduler"}
    assert set(loops["tiny-sd image-to-image"]["parts"]) == {
        "unet", "scheduler", "text_encoder", "vae encode", "vae decode",
    }  # fmt: skip
    assert {"text_encoder_2", "text_encoder"} < set(loops["tiny-sdxl text-to-image"]["parts"])
    assert "controlnet" in loops["tiny-controlnet controlnet"]["parts"]
    for loop in loops.values():
        assert all(seconds > 0 for seconds in loop.get("parts", {}).values())


@pytest.mark.worker
def test_times_of_the_components_add_up_to_at_most_the_image(found: dict[str, Any]) -> None:
    result = result_of(found, "tiny-sd")
    assert result.shares_of_seconds is not None
    assert 0 < sum(result.shares.values()) <= result.shares_of_seconds
    assert result.shares["unet"] > result.shares["scheduler"]


@pytest.mark.worker
@pytest.mark.parametrize("name", ["tiny-sd", "tiny channels_last", "tiny fp16", "tiny sliced"])
def test_one_evaluation_of_the_model_differs_from_fp32_by_less_than_the_tolerance(
    found: dict[str, Any], name: str
) -> None:
    numerics = result_of(found, name).numerics
    assert numerics is not None
    assert numerics.not_compared is None
    assert numerics.forward_error is not None
    assert numerics.tolerance is not None
    assert numerics.forward_error < numerics.tolerance
    assert numerics.repeats is True
    if name in {"tiny-sd", "tiny fp16"}:
        assert numerics.forward_error > 1e-4, "16-bit dtypes must show an error"


@pytest.mark.worker
def test_case_with_the_reference_settings_is_not_compared_with_itself(found: dict[str, Any]) -> None:
    numerics = result_of(found, "tiny").numerics
    assert numerics is not None
    assert numerics.not_compared == "the case is itself the reference in fp32"


@pytest.mark.worker
def test_case_farther_from_fp32_than_the_tolerance_is_an_error_that_keeps_its_samples(found: dict[str, Any]) -> None:
    result = result_of(found, "wrong")
    assert result.status is Status.ERROR
    assert "(relative L2 distance); the limit is 1e-09" in (result.reason or "")
    assert result.samples, "the samples are kept"


@pytest.mark.worker
def test_case_in_tf32_on_a_cpu_is_skipped(found: dict[str, Any]) -> None:
    assert result_of(found, "tf32").reason == "only NVIDIA GPUs have the format TF32"


@pytest.mark.worker
def test_measurement_uses_the_number_of_threads_of_the_case(found: dict[str, Any]) -> None:
    host = result_of(found, "threads").host
    assert host is not None
    assert host.threads == 2


@pytest.mark.worker
def test_peak_rates_of_the_machine_are_measured_with_the_images(found: dict[str, Any]) -> None:
    peaks = result_of(found, "tiny").work.peak_flops_per_second
    assert set(peaks) == {"matrix product", "convolution"}
    assert all(rate > 0 for rate in peaks.values())


@pytest.mark.worker
def test_result_has_plausible_memory_peaks(found: dict[str, Any]) -> None:
    memory = result_of(found, "tiny").memory
    assert memory.host_run_uss_peak_bytes is not None
    assert memory.host_run_peak_bytes is not None
    assert 50_000_000 < memory.host_run_uss_peak_bytes < 3 * memory.host_run_peak_bytes


@pytest.mark.worker
def test_paced_measurement_makes_one_image_for_each_line_go(found: dict[str, Any]) -> None:
    result: Result = record(found["paced"], Result, "paced")
    assert result.status is Status.OK
    assert len(result.samples) + len(result.warmups) == 3


@pytest.mark.worker
def test_weights_moved_in_memory_keep_values_and_strides_and_give_the_same_image(found: dict[str, Any]) -> None:
    placed = found["placed"]
    quarter = placed["all"] // 4
    assert placed["in no time"] == 1, "moving stops when the time is used up"
    assert quarter <= placed["moved"] <= quarter + 1
    assert placed["of a card"] == 0
    assert placed["same"]
    assert placed["strides"]


@pytest.mark.worker
def test_search_of_the_largest_batch_and_image_reports_what_limits_them(found: dict[str, Any]) -> None:
    fits = found["fits"]
    assert (fits["some"]["batch_bound"], fits["some"]["size_bound"]) == ("memory", "memory")
    assert 4 < fits["some"]["batch"] < 1000
    assert 64 < fits["some"]["size"] < 16384
    assert fits["some"]["size"] % 64 == 0
    assert (fits["none"]["batch"], fits["none"]["size"]) == (None, None), fits
    assert fits["no time"] == {"batch": 1, "batch_bound": "time", "size": 64, "size_bound": "time"}
    assert fits["compiled"]["batch_bound"] == "the model is compiled for one size"
