"""Compares the rates of `bench validate` with plain torch loops of the same shapes, in one process."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

# Two runs of a check alternate with two of the plain loop, so that a change of the machine's speed affects both alike.
# The ratio compares the best of each.
COMPARISON = """
import json, time
import torch
from bench.worker.checks import compute
from bench.worker.checks import copies
from bench.worker.checks import device as checked_device
torch.set_grad_enabled(False)
name = "cuda:0" if torch.cuda.is_available() else "cpu"
device = checked_device.access(torch, name)
wait = torch.cuda.synchronize if name != "cpu" else lambda: None
def plain(call, amount, seconds=1.0):
    best, ends = 0.0, time.perf_counter() + seconds
    call(), wait()
    while time.perf_counter() < ends:
        began = time.perf_counter()
        for _ in range(5):
            call()
        wait()
        best = max(best, 5 * amount / (time.perf_counter() - began))
    return best
def ratio(check, make):
    first = next(iter(check(time.perf_counter() + 4)))
    call, amount = make(first.figures)
    before = plain(call, amount)
    second = next(iter(check(time.perf_counter() + 4)))
    call, amount = make(second.figures)
    return max(first.value, second.value) / max(before, plain(call, amount))
def product(figures):
    m, n, k = (int(figures[key]) for key in "mnk")
    left, right = torch.randn(m, k, device=name), torch.randn(k, n, device=name)
    return (lambda: torch.mm(left, right)), 2.0 * m * n * k
def copy(figures):
    source = torch.zeros(int(figures["bytes"]), dtype=torch.uint8, device=name)
    target = torch.zeros_like(source)
    return (lambda: target.copy_(source)), 2.0 * source.numel()
device.dtypes = ("fp32",)
ratios = {"product": ratio(lambda until: compute.product(device, until), product)}
ratios["copy"] = ratio(lambda until: copies.copy(device, until), copy)
print(json.dumps(ratios))
"""


def test_rates_of_products_and_copies_against_plain_torch_loops(
    benchmark: BenchmarkFixture, measured_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> dict[str, float]:
        argv = [str(measured_python), "-c", COMPARISON]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(CHECKOUT)})
        ratios: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return ratios

    ratios = benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info.update(ratios)
    with capsys.disabled():
        print("\ncheck / plain loop:", ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
