"""The plugin for pytest-benchmark, in real runs of pytest: other people's tests, and our suites as tests."""

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

# The toolbox has pytest, the measured environment has torch: this process takes what it lacks from there.
BOTH = """
import subprocess, sys
packages = subprocess.run(
    [sys.argv.pop(1), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
).stdout.strip()
sys.path.append(packages)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
THEIRS = """
import pytest

@pytest.mark.diffusion("tiny-ddpm", dtype="bf16", batch=2, threads=1)
def test_unet(diffusion_case, benchmark):
    import torch
    assert torch.get_num_threads() == 1
    images = benchmark(diffusion_case)
    assert images.pixels.shape == (2, 3, 16, 16)
    assert not images.raw.requires_grad

def test_what_torch_was_set_to_is_back():
    import torch
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()

@pytest.mark.parametrize("diffusion_case", [{"model": "tiny-sd", "scheduler": "euler"}], indirect=True)
def test_without_a_benchmark(diffusion_case):
    assert diffusion_case.case.scheduler == "euler"
    assert diffusion_case.unet.dtype.itemsize in (2, 4)

@pytest.mark.diffusion("tiny-ddpm", offload="model")
def test_what_is_not_to_be_had(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", dtype="bf16")
@pytest.mark.parametrize("diffusion_case", [{"batch": 2}, {"model": "tiny-sd"}], indirect=True)
def test_a_parameter_goes_before_the_marker(diffusion_case, request):
    case = diffusion_case.case
    assert case.dtype == "bf16"
    assert (case.model, case.batch) in {("tiny-ddpm", 2), ("tiny-sd", 1)}

@pytest.mark.diffusion("tiny-ddpm", dtype="tf32")
def test_what_only_a_card_has(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", dtype="tf33")
def test_a_wrong_name(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", "bf16")
def test_a_second_word(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", device="cuda:7")
def test_no_such_card(diffusion_case): ...

@pytest.mark.diffusion("tiny-ddpm", device="gpu")
def test_no_such_device(diffusion_case): ...

def test_no_name(diffusion_case): ...
"""


def run(
    folder: Path, *words: object, first: list[object] | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, *(first or ["-m", "pytest"]), "-p", "no:cacheprovider", *words]
    return subprocess.run(
        [*map(str, argv)], capture_output=True, text=True, check=False, cwd=folder, env=environment(**changes)
    )


@pytest.mark.worker
def test_a_case_in_other_peoples_tests(measured_python: Path, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_theirs.py").write_text(THEIRS)
    first: list[object] = ["-c", BOTH, measured_python]
    told = tmp_path / "told.json"
    words = ["-p", "bench.pytest_plugin", "-rsE", "--benchmark-json", told]
    # Two threads, so that the one of a case is another number.
    done = run(tmp_path, *words, first=first, OMP_NUM_THREADS="2")
    assert "5 passed, 2 skipped" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
    assert "5 errors" in done.stdout
    assert "offload model: only a pipeline on a CUDA device" in done.stdout
    assert "dtype=tf33: unknown dtype 'tf33'; there is: fp64" in done.stdout
    assert "TF32 is a format of NVIDIA's cards alone" in done.stdout
    assert 'a case is told as @pytest.mark.diffusion("MODEL", AXIS=VALUE)' in done.stdout
    assert "there is no cuda:7: torch sees 0 cards" in done.stdout
    assert "unknown device 'gpu'" in done.stdout
    assert 'which model? Mark the test: @pytest.mark.diffusion("ddpm-cat-256"' in done.stdout
    found = json.loads(told.read_text())
    (benchmark,) = found["benchmarks"]
    info = benchmark["extra_info"]
    assert (info["case"]["model"], info["case"]["dtype"], info["weights"]) == ("tiny-ddpm", "bf16", "random")
    assert info["flops_per_batch"] == info["case"]["steps"] * info["flops_per_step"]
    assert info["host_run_peak_bytes"] > 100_000_000
    assert benchmark["stats"]["rounds"] >= 5
    machine = found["machine_info"]
    assert machine["firstlight"]["cores"] >= 1
    assert machine["torch"].startswith("2.")


@pytest.mark.worker
def test_a_suite_as_tests_tells_what_was_measured(measured_python: Path, tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    words = ["-p", "bench.pytest_plugin", "--diffusion-suite", "tiny", "--diffusion-device", "cpu"]
    words += ["--diffusion-python", str(measured_python), "--diffusion-root", str(tmp_path)]
    first: list[object] = ["-c", processor_clocks.PYTEST]
    done = run(tmp_path, "--pyargs", "bench.suites", *words, "--benchmark-json", told, first=first)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    kept = store.load("", tmp_path / "results")
    assert f"kept: results/{kept.id}/run.json" in done.stdout
    found = json.loads(told.read_text())["benchmarks"]
    assert [result.case.name in each["name"] for result, each in zip(kept.results, found, strict=True)] == [True, True]
    for result, each in zip(kept.results, found, strict=True):
        assert each["stats"]["data"] == pytest.approx([sample.seconds for sample in result.samples])
        assert each["extra_info"]["trust"] in {"clean", "contended"}
    machine = json.loads(told.read_text())["machine_info"]
    assert machine["torch"] == kept.results[0].software["torch"], "of the environment that was measured"
    assert kept.command == "pytest --pyargs bench.suites"


def test_a_suite_whose_interpreter_fails_fails_with_its_reason(tmp_path: Path) -> None:
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


def test_only_what_is_run_has_time_kept_for_it(tmp_path: Path) -> None:
    words = ["--diffusion-suite", "tiny", "--diffusion-device", "cpu", "--diffusion-root", str(tmp_path)]
    words += ["--diffusion-python", sys.executable, "-k", "tiny-sd"]
    done = run(tmp_path, "--pyargs", "bench.suites", "-p", "bench.pytest_plugin", *words)
    assert "1 failed, 1 deselected" in done.stdout, "the toolbox has no torch"
    assert [result.case.model for result in store.load("", tmp_path / "results").results] == ["tiny-sd"]


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--diffusion-suite", "tiny", "--diffusion-device", "cpu", "--diffusion-root", str(tmp_path)]
    words += ["--diffusion-python", sys.executable, "--diffusion-out", str(tmp_path / "file")]
    done = run(tmp_path, "--pyargs", "bench.suites", "-p", "bench.pytest_plugin", *words)
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stdout
    assert "Traceback" not in done.stdout


def test_without_an_environment_it_says_what_to_do(tmp_path: Path) -> None:
    """Also where the plugin is found by the suites' own folder alone, as in a checkout."""
    done = run(tmp_path, "--pyargs", "bench.suites")
    assert done.returncode != 0
    assert "Run `make setup`, or name an interpreter with --diffusion-python." in done.stdout


def test_a_replayed_clock_moves_by_what_was_measured() -> None:
    clock: Any = Replay()
    clock.wind([2.0, 0.5])
    began = clock()
    clock.tick()
    assert clock() - began == 2.0
    clock.tick()
    assert clock() - began == 2.5
    clock.tick()
    assert clock() - began == 2.5, "a profiler's round takes no time"
