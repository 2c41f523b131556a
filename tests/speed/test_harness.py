"""Measures how much time `bench` adds to a plain diffusers loop, and how often it detects a known slowdown."""

from __future__ import annotations

import json
import statistics
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.core import stats
from bench.core.result import Status
from bench.launch import worker_process
from bench.run import compare, disturbance, request, suite_run
from tests.bench.fake_workers import RecordedProgress
from tests.conftest import CHECKOUT, TEST_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

    from bench.core.result import Run

# Prints pairs of times: [by bench, by the plain loop]. The two of a pair run one after the other, in alternating order,
# so that a change of the machine's speed affects both alike.
BARE = """
import json, sys, time
import torch
from diffusers import DDIMScheduler
from bench.worker import device_timers, components, sampling, timing
from bench.core.result import Case
torch.set_grad_enabled(False)
case = Case("ddpm-cat-256", "cpu", "fp32", "ddim", 4, 1, 64, 64)
model = components.Model(torch, case)
model.load({})
loop = sampling.Loop(model)
unet, scheduler = model.components["unet"], DDIMScheduler.from_config(model.config["scheduler"])
noise = torch.randn(1, 3, 64, 64)
def bare():
    began = time.perf_counter()
    scheduler.set_timesteps(case.steps)
    image = noise
    for step in scheduler.timesteps:
        image = scheduler.step(unet(image, step).sample, step, image).prev_sample
    return time.perf_counter() - began
def harness():
    (sample,) = timing.take(loop, device_timers.HostClock(), lambda images: not images.every, lambda event: None).every
    return sample.seconds
bare(), harness()
pairs = []
for turn in range(int(sys.argv[1])):
    first, second = (bare, harness) if turn % 2 else (harness, bare)
    times = {first.__name__: first(), second.__name__: second()}
    pairs.append((times["harness"], times["bare"]))
print(json.dumps(pairs))
"""
# Runs the real worker with a slower UNet: after each evaluation it spins for SHARE times the evaluation's time.
SLOWED_WORKER = """
import runpy, sys, time, types
sys.path[:] = [entry for entry in sys.path if entry]
sys.modules["bench"] = types.ModuleType("bench")
sys.modules["bench"].__path__ = [sys.argv[1]]
from bench.worker import sampling
original = sampling.Loop.__init__
def slower(self, model):
    original(self, model)
    unet, forward = model.components["unet"], model.components["unet"].forward
    def late(*args, **named):
        began = time.perf_counter()
        output = forward(*args, **named)
        ends = time.perf_counter() + SHARE * (time.perf_counter() - began)
        while time.perf_counter() < ends:
            pass
        return output
    unet.forward = late
sampling.Loop.__init__ = slower
runpy.run_module("bench.worker", run_name="__main__", alter_sys=True)
"""
TIMES = 20
SUITE = """
description = "one short case"
[budget]
cpu = 120
cuda = 120
mps = 120
[[matrix]]
model = "MODEL"
dtype = "bf16"
scheduler = "ddim"
layout = "channels_last"
cpu = {size = 32, steps = 4}
"""


@pytest.fixture
def measure(measured_python: Path, tmp_path: Path) -> Callable[..., Run]:
    def measure_once(model: str = "ddpm-cat-256", **changes: object) -> Run:
        suite = tmp_path / "short.toml"
        suite.write_text(SUITE.replace("MODEL", model))
        run_request = request.RunRequest(
            suite=str(suite), device="cpu", python=measured_python, root=str(TEST_ROOT), out=tmp_path / "out"
        )
        return suite_run.run(replace(run_request, **changes), RecordedProgress())  # type: ignore[arg-type]

    return measure_once


def test_reported_time_of_an_image_against_a_plain_loop(
    benchmark: BenchmarkFixture, measured_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(measured_python), "-c", BARE, "40"]

    def run() -> list[list[float]]:
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(CHECKOUT)})
        pairs: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
        return pairs

    pairs = benchmark.pedantic(run, rounds=1, iterations=1)
    harness, bare = zip(*pairs, strict=True)
    ratio = stats.paired_ratio(bare, harness)
    ratios = {
        "median of pairs": ratio.median,
        "from": ratio.low,
        "to": ratio.high,
        "of minima": min(harness) / min(bare),
    }
    benchmark.extra_info.update(ratios)
    with capsys.disabled():
        print("\nharness / bare loop:", ", ".join(f"{name} {ratio:.4f}" for name, ratio in ratios.items()))


@pytest.mark.parametrize("share", [0.05, 0.0], ids=["one side 5 % slower", "equal sides"])
def test_verdicts_on_a_slowed_side_and_on_equal_sides(
    benchmark: BenchmarkFixture,
    measure: Callable[..., Run],
    measured_python: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    share: float,
) -> None:
    # Both sides run the same case by the same worker; with a share above 0, one side has the slowed UNet.
    link = tmp_path / "slowed-python"
    original = worker_process.worker_command

    def command(python: Path) -> list[str]:
        words = list(original(python))
        if python == link and share:
            words[2:] = [SLOWED_WORKER.replace("SHARE", str(share)), words[3]]
        return words

    monkeypatch.setattr(worker_process, "worker_command", command)

    def run() -> list[tuple[str, float, float, str]]:
        comparisons = []
        for _ in range(TIMES):
            measured = measure(interleave=("threads=0", f"threads=0,python={link}"), budget_seconds=60.0)
            (row,) = compare.compare_pairs(measured).rows
            ratio = row.ratio.median if row.ratio else 0.0
            spread = row.ratio.spread if row.ratio else 0.0
            comparisons.append((row.state, ratio, spread, row.reason))
        return comparisons

    link.write_text(f'#!/bin/sh\nexec {measured_python} "$@"\n')
    link.chmod(0o755)
    rows = benchmark.pedantic(run, rounds=1, iterations=1)
    states = {state: sum(row[0] == state for row in rows) for state in sorted({row[0] for row in rows})}
    benchmark.extra_info.update({"share": share, "states": states, "rows": rows})
    with capsys.disabled():
        ratios = " ".join(f"{ratio:.3f}±{spread:.3f}" for _, ratio, spread, _ in rows)
        print(f"\nslowed by {share:.0%}, {TIMES} comparisons: {states}; ratios {ratios}")


def test_spread_of_the_medians_of_five_equal_runs(
    benchmark: BenchmarkFixture, measure: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    # Run one case five times, each in a new worker; also report the share of a core that the parent process uses.
    def run() -> list[Run]:
        return [measure(changes=("size=64",), budget_seconds=40.0) for _ in range(5)]

    results = [run.results[0] for run in benchmark.pedantic(run, rounds=1, iterations=1)]
    assert all(result.status is Status.OK for result in results)
    clean = [result for result in results if disturbance.of_case(result) is None] or results
    copies = [max(result.work.copy_bytes_per_second) for result in clean]
    # A hypervisor may move the cores of a virtual machine; only runs with similar copy rates are compared.
    middle = statistics.median(copies)
    alike = [result for result, copy in zip(clean, copies, strict=True) if abs(copy / middle - 1) < 0.12]
    clean = alike
    medians = [summary.median for result in clean if (summary := stats.image_seconds(result)) is not None]
    shares = [result.host.harness_share for result in results if result.host and result.host.harness_share is not None]
    figures = {
        "clean, of one machine": len(clean),
        "copies, GB/s, largest / smallest": max(copies) / min(copies),
        "largest / smallest median": max(medians) / min(medians),
        "parent, share of a core": max(shares, default=float("nan")),
    }
    benchmark.extra_info.update(figures)
    with capsys.disabled():
        print("\nfive runs:", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def test_seconds_of_a_run_that_are_not_spent_on_images(
    benchmark: BenchmarkFixture, measure: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    # The overhead is the wall time of the run minus all images: the start, the weights, the probes and the checks.
    def run() -> dict[str, float]:
        overheads = {}
        for model in ("ddpm-cat-256", "stable-diffusion-v1-5"):
            changes = ("size=64",) if model == "ddpm-cat-256" else ("size=128", "steps=2")
            measured = measure(model, changes=changes)
            for _ in range(4):
                if (
                    measured.results[0].attempts == 1
                ):  # a case that was disturbed is repeated, and the result keeps only the second attempt
                    break
                measured = measure(model, changes=changes)
            (result,) = measured.results
            assert result.status is Status.OK, result.reason
            assert result.attempts == 1, "each run was disturbed"
            # The first image, and the image of the checks, also count as images.
            images = sum(image.seconds for image in (*result.warmups, *result.samples))
            images += result.shares_of_seconds or 0.0
            overheads[model] = measured.seconds - images - (result.phases.first_image_seconds or 0.0)
        return overheads

    figures = benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info.update(figures)
    with capsys.disabled():
        print("\nseconds besides the images:", ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
