"""Tests bench's pytest plugin in real pytest runs: its fixture in a user's tests, and the cases of suites as tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from bench.pytest_plugin import Replay
from bench.run import store
from tests.bench import processor_clocks
from tests.bench.conftest import environment

if TYPE_CHECKING:
    from pathlib import Path

# Runs pytest in a process that imports pytest from firstlight's own environment, and torch from the measured one.
PYTEST_WITH_TORCH = """
import subprocess, sys
packages = subprocess.run(
    [sys.argv.pop(1), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
).stdout.strip()
sys.path.append(packages)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
USER_TESTS = """
import pytest

@pytest.mark.diffusion("tiny-ddpm", dtype="bf16", batch=2, threads=1)
def test_unet(diffusion_case, benchmark):
    import torch
    assert torch.get_num_threads() == 1
    images = benchmark(diffusion_case)
    assert images.pixels.shape == (2, 3, 16, 16)
    assert not images.raw.requires_grad

def test_torch_settings_are_restored():
    import torch
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()

@pytest.mark.parametrize("diffusion_case", [{"model": "tiny-sd", "scheduler": "euler"}], indirect=True)
def test_without_a_benchmark(diffusion_case):
    assert diffusion_case.case.scheduler == "euler"
    assert diffusion_case.unet.dtype.itemsize in (2, 4)

@pytest.mark.diffusion("tiny-ddpm", offload="model")
def test_offload_needs_cuda(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", dtype="bf16")
@pytest.mark.parametrize("diffusion_case", [{"batch": 2}, {"model": "tiny-sd"}], indirect=True)
def test_parameter_overrides_the_marker(diffusion_case, request):
    case = diffusion_case.case
    assert case.dtype == "bf16"
    assert (case.model, case.batch) in {("tiny-ddpm", 2), ("tiny-sd", 1)}

@pytest.mark.diffusion("tiny-ddpm", dtype="tf32")
def test_tf32_needs_an_nvidia_gpu(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", dtype="tf33")
def test_unknown_dtype(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", "bf16")
def test_second_positional_argument(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", device="cuda:7")
def test_absent_gpu(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", device="gpu")
def test_unknown_device(diffusion_case): ...

def test_without_a_model(diffusion_case): ...
"""


def run(
    folder: Path, *words: object, first: list[object] | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, *(first or ["-m", "pytest"]), "-p", "no:cacheprovider", *words]
    return subprocess.run(
        [*map(str, argv)], capture_output=True, text=True, check=False, cwd=folder, env=environment(**changes)
    )


@pytest.mark.worker
def test_fixture_diffusion_case_measures_in_a_users_tests_and_rejects_invalid_cases(
    measured_python: Path, tmp_path: Path
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_user.py").write_text(USER_TESTS)
    first: list[object] = ["-c", PYTEST_WITH_TORCH, measured_python]
    report = tmp_path / "benchmark.json"
    words = ["-p", "bench.pytest_plugin", "-rsE", "--benchmark-json", report]
    # Torch starts with two threads, so that a case with threads=1 changes the setting.
    done = run(tmp_path, *words, first=first, OMP_NUM_THREADS="2")
    assert "5 passed, 2 skipped" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
    assert "5 errors" in done.stdout
    assert "offload model: only a pipeline on a CUDA device" in done.stdout
    assert "dtype=tf33: unknown dtype 'tf33'; valid names: fp64" in done.stdout
    assert "only NVIDIA GPUs have the format TF32" in done.stdout
    assert 'Mark the test as @pytest.mark.diffusion("MODEL", AXIS=VALUE)' in done.stdout
    assert "torch does not list cuda:7, and the number of GPUs that it lists is 0." in done.stdout
    assert "unknown device 'gpu'" in done.stdout
    assert 'no model is given. Mark the test: @pytest.mark.diffusion("ddpm-cat-256"' in done.stdout
    content = json.loads(report.read_text())
    (benchmark,) = content["benchmarks"]
    info = benchmark["extra_info"]
    assert (info["case"]["model"], info["case"]["dtype"], info["weights"]) == ("tiny-ddpm", "bf16", "random")
    assert info["flops_per_batch"] == info["case"]["steps"] * info["flops_per_step"]
    assert info["host_run_peak_bytes"] > 100_000_000
    assert benchmark["stats"]["rounds"] >= 5
    machine = content["machine_info"]
    assert machine["firstlight"]["cores"] >= 1
    assert machine["torch"].startswith("2.")


@pytest.mark.worker
def test_suite_run_by_pytest_reports_samples_and_torch_version_of_the_measured_environment(
    measured_python: Path, tmp_path: Path
) -> None:
    report = tmp_path / "benchmark.json"
    words = ["-p", "bench.pytest_plugin", "--diffusion-suite", "tiny", "--diffusion-device", "cpu"]
    words += ["--diffusion-python", str(measured_python), "--diffusion-root", str(tmp_path)]
    first: list[object] = ["-c", processor_clocks.PYTEST]
    done = run(tmp_path, "--pyargs", "bench.suites", *words, "--benchmark-json", report, first=first)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    kept = store.load("", tmp_path / "results")
    assert f"kept: results/{kept.id}/run.json" in done.stdout
    benchmarks = json.loads(report.read_text())["benchmarks"]
    assert [
        result.case.name in benchmark["name"] for result, benchmark in zip(kept.results, benchmarks, strict=True)
    ] == [True, True]
    for result, benchmark in zip(kept.results, benchmarks, strict=True):
        assert benchmark["stats"]["data"] == pytest.approx([sample.seconds for sample in result.samples])
        assert benchmark["extra_info"]["trust"] in {"clean", "contended"}
    machine = json.loads(report.read_text())["machine_info"]
    assert machine["torch"] == kept.results[0].software["torch"], "the version of the measured environment"
    assert kept.command == "pytest --pyargs bench.suites"


def test_suite_run_by_pytest_fails_with_the_error_output_of_its_interpreter(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no torch here >&2\nexit 3\n")
    python.chmod(0o755)
    words = ["--diffusion-suite", "tiny", "--diffusion-device", "cpu", "--diffusion-root", str(tmp_path)]
    done = run(
        tmp_path, "--pyargs", "bench.suites", "-p", "bench.pytest_plugin", "--diffusion-python", str(python), *words
    )
    assert done.returncode == 1
    assert "2 failed" in done.stdout
    assert "no torch here" in done.stdout


def test_cases_that_pytest_deselects_are_not_measured(tmp_path: Path) -> None:
    words = ["--diffusion-suite", "tiny", "--diffusion-device", "cpu", "--diffusion-root", str(tmp_path)]
    words += ["--diffusion-python", sys.executable, "-k", "tiny-sd"]
    done = run(tmp_path, "--pyargs", "bench.suites", "-p", "bench.pytest_plugin", *words)
    assert "1 failed, 1 deselected" in done.stdout, "firstlight's own environment has no torch"
    assert [result.case.model for result in store.load("", tmp_path / "results").results] == ["tiny-sd"]


def test_suite_run_by_pytest_with_an_invalid_output_folder_fails_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--diffusion-suite", "tiny", "--diffusion-device", "cpu", "--diffusion-root", str(tmp_path)]
    words += ["--diffusion-python", sys.executable, "--diffusion-out", str(tmp_path / "file")]
    done = run(tmp_path, "--pyargs", "bench.suites", "-p", "bench.pytest_plugin", *words)
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stdout
    assert "Traceback" not in done.stdout


def test_suite_run_by_pytest_without_an_environment_names_the_setup_command(tmp_path: Path) -> None:
    # No -p flag: bench/suites/conftest.py loads the plugin.
    done = run(tmp_path, "--pyargs", "bench.suites")
    assert done.returncode != 0
    assert "Run `make setup`, or name an interpreter with --diffusion-python." in done.stdout


def test_replay_clock_advances_by_one_sample_for_each_round() -> None:
    clock: Any = Replay()
    clock.wind([2.0, 0.5])
    began = clock()
    clock.tick()
    assert clock() - began == 2.0
    clock.tick()
    assert clock() - began == 2.5
    clock.tick()
    assert clock() - began == 2.5, "a round beyond the samples, such as a profiler's, takes no time"
