"""Tests the predicted time of a case: the rate behind the prediction, and the check during the first image."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.errors import SkipError
from bench.worker import device_probe, predicted_time
from tests.bench.conftest import a_case

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that simulates the first image of a case with given step times, and checks after each step."""

    def run(steps: list[float], *, limit: float, device: str = "cpu") -> None:
        now = [0.0]
        monkeypatch.setattr(predicted_time, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        check = predicted_time.time_check(a_case(device=device), len(steps), 3, limit)
        check()
        for seconds in steps:
            now[0] += seconds
            check()

    return run


def test_case_is_not_skipped_for_one_slow_step(image: Callable[..., None]) -> None:
    image([100.0, 1.0, 1.0, 1.0], limit=120.0)
    image([1.0, 100.0, 1.0, 1.0], limit=120.0)


def test_case_with_slow_steps_is_skipped_after_the_second_step(image: Callable[..., None]) -> None:
    with pytest.raises(SkipError, match=r"predicted 10 s a step, 140 s for the shortest run; the budget leaves 80 s"):
        image([10.0, 10.0, 10.0, 10.0], limit=100.0)


def test_case_is_skipped_by_the_faster_of_two_slow_steps(image: Callable[..., None]) -> None:
    with pytest.raises(SkipError, match=r"predicted 50 s a step, 300 s"):
        image([60.0, 50.0], limit=200.0)


def test_case_on_a_gpu_is_not_skipped_by_step_times_of_the_host_clock(image: Callable[..., None]) -> None:
    image([100.0, 100.0], limit=1.0, device="cuda:0")


def torch_of(*capability: int) -> Any:
    """Return an object in place of torch whose GPU has this compute capability."""
    return SimpleNamespace(cuda=SimpleNamespace(get_device_capability=lambda _: capability))


@pytest.mark.parametrize(
    ("capability", "dtype", "rate", "fp32", "price"),
    [
        ((8, 0), "bf16", 1e10, 1e13, 1e13),  # the probe was disturbed: no kernel is a thousand times slower
        ((8, 0), "bf16", 1e12, 1e13, 1e12),
        ((8, 0), "bf16", 1e10, None, 1e10),  # the rate of fp32 is unknown
        ((7, 5), "bf16", 1e10, 1e13, 1e10),  # a GPU of 7.5 emulates bf16
        ((8, 9), "fp64", 1e12, 8e13, 1e12),  # fp64 has a 64th of the fp32 rate, as NVIDIA documents
    ],
)
def test_rate_that_is_implausibly_far_below_fp32_is_replaced_by_the_rate_of_fp32(
    capability: tuple[int, int], dtype: str, rate: float, fp32: float | None, price: float
) -> None:
    case = a_case(device="cuda:0", dtype=dtype)
    assert predicted_time.usable_rate(torch_of(*capability), case, rate, fp32) == price


def test_rate_of_a_cpu_far_below_fp32_is_not_replaced() -> None:
    assert predicted_time.usable_rate(None, a_case(dtype="fp16"), 1e9, 1e12) == 1e9


@pytest.mark.parametrize(
    ("capability", "fp16", "bf16"),
    [((6, 0), True, False), ((6, 1), False, False), ((7, 5), True, False), ((8, 9), True, True)],
)
def test_gpu_has_kernels_for_a_dtype_from_its_compute_capability_on(
    capability: tuple[int, int], *, fp16: bool, bf16: bool
) -> None:
    torch = torch_of(*capability)
    assert [device_probe.has_kernels(torch, "cuda:0", name) for name in ("fp32", "fp16", "bf16")] == [True, fp16, bf16]


def test_kernels_of_a_dtype_are_none_if_torch_does_not_report_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    old_torch = SimpleNamespace(ops=SimpleNamespace(mkldnn=SimpleNamespace()))
    assert device_probe.has_kernels(old_torch, "cpu", "bf16") is None
    without_bf16 = SimpleNamespace(ops=SimpleNamespace(mkldnn=SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False)))
    assert device_probe.has_kernels(without_bf16, "cpu", "bf16") is False
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert device_probe.has_kernels(without_bf16, "cpu", "bf16") is False, "torch also checks the processor on ARM"
    assert device_probe.has_kernels(without_bf16, "cpu", "fp16") is None
    assert device_probe.has_kernels(without_bf16, "mps", "fp16") is True


@pytest.mark.parametrize(
    ("device", "offload", "fits"),
    [("cuda:0", "none", False), ("cuda:0", "sequential", True), ("cpu", "none", True)],
)
def test_case_is_skipped_if_its_weights_are_larger_than_the_gpu_memory_unless_offloaded(
    device: str, offload: str, *, fits: bool
) -> None:
    card = SimpleNamespace(total_memory=4_000_000_000)
    torch = SimpleNamespace(cuda=SimpleNamespace(get_device_properties=lambda _: card))
    case = a_case(device=device, offload=offload)
    predicted_time.check_memory(torch, case, 4_000_000_000)
    with contextlib.nullcontext() if fits else pytest.raises(SkipError, match=r"take 4\.27 GB, and the card has 4 GB"):
        predicted_time.check_memory(torch, case, 4_270_000_000)


@pytest.mark.parametrize(("cpus", "rate"), [(None, 64e9), (4.0, 4e9), (0.5, 0.5e9), (100.0, 64e9)])
def test_rate_of_a_cpu_is_multiplied_by_at_most_the_cpus_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, cpus: float | None, rate: float
) -> None:
    monkeypatch.setattr(device_probe, "_rate", lambda *_: 1e9)
    torch = SimpleNamespace(get_num_threads=lambda: 64, set_num_threads=lambda _: None)
    assert device_probe.rate(torch, "cpu", "fp32", cpus) == rate


def test_probe_times_a_call_by_cpu_time_or_by_wall_time_if_that_clock_is_too_coarse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walls = itertools.count()
    fine = SimpleNamespace(resolution=1e-9)
    clock = SimpleNamespace(
        get_clock_info=lambda _: fine, thread_time=lambda: 5.0, perf_counter=lambda: float(next(walls))
    )
    monkeypatch.setattr(device_probe, "time", clock)
    assert device_probe._cpu_seconds(lambda: None) == 1e-9
    fine.resolution = 1 / 64  # a clock that is too coarse to time a call
    assert device_probe._cpu_seconds(lambda: None) == 1.0
