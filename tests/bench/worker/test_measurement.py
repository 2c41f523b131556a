"""Tests the measurements that measure_cases.py has made with real torch and diffusers, and failed ones."""

from __future__ import annotations

import hashlib
import shutil
import struct
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import stats
from bench.core.result import Status
from tests.bench.conftest import result_of

if TYPE_CHECKING:
    from pathlib import Path

PNG = b"\x89PNG\r\n\x1a\n"


def picture_of(found: dict[str, Any], name: str) -> str:
    """Return the SHA-256 of the image of a measured case."""
    numerics = result_of(found, name).numerics
    assert numerics is not None
    return numerics.image_sha256


@pytest.mark.worker
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cat", {"unet": 113_673_219}),
        ("sd", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
    ],
)
def test_number_of_parameters_of_an_architecture_is_the_published_one(
    found: dict[str, Any], name: str, parameters: dict[str, int]
) -> None:
    assert found[name]["parameters"] == parameters
    assert found[name]["devices"] == ["meta"], "the parameters are counted without allocating them"


@pytest.mark.worker
@pytest.mark.parametrize(("name", "flops"), [("cat", 31.03e9), ("cat 256", 497.0e9), ("sd", 1.607e12)])
def test_flops_of_a_step_are_within_1_percent_of_the_published_ones(
    found: dict[str, Any], name: str, flops: float
) -> None:
    assert found[name]["step"] == pytest.approx(flops, rel=0.01)


@pytest.mark.worker
def test_flops_of_a_batch_grow_with_batch_size_and_steps(found: dict[str, Any]) -> None:
    cat, three, sd = found["cat"], found["cat batch 3"], found["sd"]
    assert three["step"] == 3 * cat["step"]
    assert cat["batch"] == 50 * cat["step"]
    # A batch also has the FLOPs of the text encoder and of the VAE decoder.
    assert sd["batch"] > 20 * sd["step"]


@pytest.mark.worker
def test_query_returns_the_version_of_torch_and_its_devices(found: dict[str, Any]) -> None:
    query = found["query"]
    assert set(query) == {"torch", "cuda", "available", "devices", "architectures", "mps", "refusal"}
    assert query["refusal"] is None or (query["cuda"] is not None and not query["available"])
    assert query["torch"][0].isdigit()
    assert bool(query["devices"]) is query["available"]
    assert bool(query["architectures"]) is (query["cuda"] is not None)


@pytest.mark.worker
def test_rate_of_the_probe_ignores_a_slow_first_call(found: dict[str, Any]) -> None:
    rates = found["probe"]["rates"]
    assert rates["quiet"] == 2 * 64 * 64 * 9 * 512**2 / 0.001
    assert rates["slow start"] == rates["quiet"]


@pytest.mark.worker
def test_rate_of_the_probe_is_that_of_the_shortest_call(found: dict[str, Any]) -> None:
    rates = found["probe"]["rates"]
    assert rates["other work"] == rates["quiet"]


@pytest.mark.worker
def test_rate_of_a_cpu_is_multiplied_by_the_number_of_threads(found: dict[str, Any]) -> None:
    probe = found["probe"]
    assert probe["threads kept"] == 2
    assert probe["two"] > probe["one"]
    assert probe["kernels"]["fp32"] is True


SUCCESSFUL = (
    "tiny",
    "tiny again",
    "tiny channels_last",
    "tiny ddpm",
    "tiny dpmpp-karras",
    "tiny-sd",
    "whole",
    "other",
    "parts",
)


@pytest.mark.worker
@pytest.mark.parametrize("name", SUCCESSFUL)
def test_result_of_a_successful_measurement_has_all_its_fields(found: dict[str, Any], name: str) -> None:
    result = result_of(found, name)
    assert (result.status, result.reason) == (Status.OK, None)
    assert len(result.samples) + len(result.warmups) == stats.MIN_SAMPLES
    for sample in result.samples:
        assert len(sample.step_seconds) == result.case.steps
        assert all(seconds > 0 for seconds in sample.step_seconds)
        assert sum(sample.step_seconds) <= sample.seconds
        assert sample.cpu_seconds > 0
    assert result.phases.load_seconds is not None
    assert result.phases.first_image_seconds is not None
    assert set(result.software) == {"python", "torch", "diffusers"}
    assert result.software["torch"] == found["query"]["torch"]
    assert result.host is not None
    assert result.host.threads == 1
    assert result.memory.device_peak_allocated_bytes is None
    assert (result.memory.host_load_peak_bytes or 0) > 100_000_000  # torch alone needs more
    assert (result.memory.host_run_peak_bytes or 0) > 100_000_000


@pytest.mark.worker
def test_events_of_a_measurement_are_sent_phase_by_phase_and_sample_by_sample(found: dict[str, Any]) -> None:
    # If the process ends early, its parent has these data.
    events = found["tiny"]["events"]
    assert [event["phase"] for event in events if "phase" in event] == [
        "imports",
        "probe",
        "load",
        "first image",
        "samples",
        "probe",
        "checks",
    ]
    result = found["tiny"]["result"]
    assert [event["sample"] for event in events if "sample" in event] == result["warmups"] + result["samples"]
    assert [event["phases"] for event in events if "phases" in event] == [found["tiny"]["result"]["phases"]]


@pytest.mark.worker
@pytest.mark.parametrize(("name", "file", "size"), [("tiny", "tiny.png", (16, 16)), ("tiny-sd", "sd.png", (64, 64))])
def test_picture_of_a_case_is_stored_as_a_png_of_its_size(
    found: dict[str, Any], folder: Path, name: str, file: str, size: tuple[int, int]
) -> None:
    content = (folder / file).read_bytes()
    assert content.startswith(PNG)
    assert struct.unpack(">II", content[16:24]) == size  # in the first chunk of a PNG
    numerics = result_of(found, name).numerics
    assert numerics is not None
    assert numerics.finite
    assert numerics.image == file
    grey = hashlib.sha256(bytes([127]) * size[0] * size[1] * 3).hexdigest()
    assert numerics.image_sha256 != grey, "a grey picture means that nothing was computed"


@pytest.mark.worker
def test_request_without_a_picture_path_stores_no_picture(found: dict[str, Any]) -> None:
    numerics = result_of(found, "tiny again").numerics
    assert numerics is not None
    assert numerics.image is None


@pytest.mark.worker
def test_same_seed_gives_the_same_picture(found: dict[str, Any]) -> None:
    assert picture_of(found, "tiny") == picture_of(found, "tiny again")
    assert picture_of(found, "tiny-sd") == picture_of(found, "tiny-sd again")


@pytest.mark.worker
def test_different_seed_or_scheduler_gives_a_different_picture(found: dict[str, Any]) -> None:
    names = ["tiny", "tiny seed 1", "tiny ddpm", "tiny dpmpp-karras"]
    assert len({picture_of(found, name) for name in names}) == len(names)


@pytest.mark.worker
def test_weights_are_loaded_from_the_snapshot_of_the_request(found: dict[str, Any]) -> None:
    # The snapshot has the weights of the random model, so the picture must be the same.
    for name, random in (("whole", "tiny"), ("parts", "tiny-sd")):
        assert result_of(found, name).weights == "real"
        assert result_of(found, random).weights == "random"
        assert picture_of(found, name) == picture_of(found, random)
    # A snapshot with other weights (named as the fp16 variant) gives another picture.
    assert result_of(found, "other").weights == "real"
    assert picture_of(found, "other") != picture_of(found, "tiny")


@pytest.mark.worker
def test_snapshot_with_pickled_weights_is_an_error(found: dict[str, Any], folder: Path) -> None:
    assert list((folder / "pickled").glob("*.bin"))
    result = result_of(found, "pickled")
    assert result.status is Status.ERROR
    assert "safetensors" in (result.reason or "")
    assert result.samples == ()


@pytest.mark.worker
def test_case_predicted_to_exceed_the_budget_is_skipped_before_its_weights_are_loaded(found: dict[str, Any]) -> None:
    result = result_of(found, "too long")
    assert result.status is Status.SKIPPED
    predicted, _, rest = (result.reason or "").removeprefix("predicted ").partition(" s a step, ")
    assert float(predicted) == pytest.approx(result.work.predicted_step_seconds, rel=0.01)
    assert float(rest.split()[0]) > 5
    assert "the budget leaves" in rest
    assert result.phases.load_seconds is None
    assert {"phase": "load"} not in found["too long"]["events"]


@pytest.mark.worker
def test_case_whose_first_steps_are_too_slow_for_the_budget_is_skipped(found: dict[str, Any]) -> None:
    result = result_of(found, "overrated")
    assert result.status is Status.SKIPPED
    assert (result.reason or "").startswith("predicted ")
    assert {"phase": "first image"} in found["overrated"]["events"]
    assert {"phase": "samples"} not in found["overrated"]["events"]


@pytest.mark.worker
def test_copy_rate_is_measured_before_and_after_the_images(found: dict[str, Any]) -> None:
    copies = result_of(found, "tiny").work.copy_bytes_per_second
    assert len(copies) >= 2
    assert all(rate > 0 for rate in copies)


@pytest.mark.worker
def test_rate_of_an_earlier_case_replaces_that_of_a_disturbed_probe(found: dict[str, Any]) -> None:
    result = result_of(found, "underrated")
    assert result.status is Status.OK
    assert result.work.probe_flops_per_second == 1e12


@pytest.mark.worker
def test_case_with_time_for_only_one_image_is_a_timeout_that_keeps_the_sample(found: dict[str, Any]) -> None:
    result = result_of(found, "too few")
    assert result.status is Status.TIMEOUT
    assert result.reason == "an image took 250 s: after 1 images the budget leaves no time for another"
    assert [sample.seconds for sample in result.samples] == [250.0], "the sample is kept"


@pytest.mark.worker
def test_case_whose_predicted_compile_time_exceeds_the_budget_is_skipped(found: dict[str, Any]) -> None:
    # The prediction comes from compiling one block of the model with the real compiler.
    result = result_of(found, "compiled")
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    assert result.status is Status.SKIPPED
    predicted = result.work.predicted_compile_seconds
    assert predicted is not None
    assert predicted > 31
    assert (result.reason or "").startswith(f"compiling would take about {predicted:.0f} s and the fewest images ")
    assert result.phases.load_seconds is None


@pytest.mark.worker
def test_compiled_case_without_a_compiler_is_skipped(found: dict[str, Any]) -> None:
    result = result_of(found, "no compiler")
    assert result.status is Status.SKIPPED
    assert result.reason == "torch.compile cannot be used here: not implemented for 'Half'"


@pytest.mark.worker
def test_case_with_an_unsupported_dtype_is_skipped(found: dict[str, Any]) -> None:
    result = result_of(found, "no dtype")
    assert result.status is Status.SKIPPED
    assert result.reason == "cpu cannot compute in fp32: not implemented for 'Half'"


@pytest.mark.worker
def test_case_on_a_gpu_without_free_memory_is_out_of_memory(found: dict[str, Any]) -> None:
    result = result_of(found, "filled")
    assert result.status is Status.OOM
    assert result.reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.worker
def test_case_whose_image_has_nan_is_an_error_with_its_picture(found: dict[str, Any], folder: Path) -> None:
    result = result_of(found, "poisoned")
    assert result.status is Status.ERROR
    assert "NaN" in (result.reason or "")
    assert result.numerics is not None
    assert not result.numerics.finite
    # The picture is stored, so that the user can look at it.
    assert (folder / "nan.png").read_bytes().startswith(PNG)


@pytest.mark.worker
def test_case_for_which_the_host_has_too_little_memory_is_out_of_memory(found: dict[str, Any]) -> None:
    result = result_of(found, "no memory")
    assert result.status is Status.OOM
    assert "can't allocate memory" in (result.reason or "")
    assert len(result.reason or "") <= 2000


@pytest.mark.worker
@pytest.mark.parametrize("name", ["no memory", "overrated", "pickled"])
def test_result_of_a_failed_measurement_keeps_the_data_before_the_failure(found: dict[str, Any], name: str) -> None:
    result = result_of(found, name)
    assert result.software["torch"] == found["query"]["torch"]
    assert result.work.flops_per_step
    assert result.phases.imports_seconds is not None
