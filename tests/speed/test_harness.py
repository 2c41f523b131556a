"""What the harness itself costs: the step that it reports against a bare diffusers loop, in one process."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

# Each pair is taken back to back and in turn first, so that a change of the machine's speed falls on both alike.
PROGRAM = """
import json, statistics, sys, time
import torch
from diffusers import DDIMScheduler
from bench import meter, sampling, worker
from bench.result import Case
torch.set_grad_enabled(False)
case = Case("ddpm-cat-256", "cpu", "fp32", "ddim", 4, 1, 64, 64)
model = sampling.Model(torch, case)
loop = model.load(None)
unet, scheduler = model.components["unet"], DDIMScheduler.from_config(model.config["scheduler"])
noise = torch.randn(1, 3, 64, 64)
def bare():
    scheduler.set_timesteps(case.steps)
    image = noise
    began = time.perf_counter()
    for step in scheduler.timesteps:
        image = scheduler.step(unet(image, step).sample, step, image).prev_sample
    return (time.perf_counter() - began) / case.steps
def harness():
    worker.MIN_SAMPLES = 1
    (sample,) = worker.sample_loop(loop, meter.HostClock(), 0.0, lambda event: None)
    return statistics.median(sample.step_seconds)
bare(), harness()
pairs = []
for turn in range(int(sys.argv[1])):
    first, second = (bare, harness) if turn % 2 else (harness, bare)
    times = {first.__name__: first(), second.__name__: second()}
    pairs.append((times["harness"], times["bare"]))
print(json.dumps(pairs))
"""


def test_the_reported_step_against_a_bare_loop(
    benchmark: BenchmarkFixture, measured_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import statistics

    argv = [str(measured_python), "-c", PROGRAM, "24"]

    def run() -> list[list[float]]:
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(CHECKOUT)})
        pairs: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
        return pairs

    pairs = benchmark.pedantic(run, rounds=1, iterations=1)
    harness, bare = zip(*pairs, strict=True)
    ratios = {
        "median of pairs": statistics.median(a / b for a, b in pairs),
        "of medians": statistics.median(harness) / statistics.median(bare),
        "of minima": min(harness) / min(bare),
    }
    benchmark.extra_info.update(ratios)
    with capsys.disabled():
        print("\nharness / bare step:", ", ".join(f"{name} {ratio:.4f}" for name, ratio in ratios.items()))
