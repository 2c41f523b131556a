"""Tests the monitor of a worker, which reads GPU and host while a case runs; with invented answers of the driver."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import stats
from bench.core.validation_records import GpuLoadStats
from bench.gpu import nvml
from bench.gpu.nvml import NvmlDevice, NvmlSample
from bench.launch import monitor
from bench.run import disturbance
from tests.bench.conftest import a_case, a_host, a_result

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OWN_PID = os.getpid()


class Driver(ModuleType):
    """Replaces the module pynvml: it answers as a T4 at its power limit would, by the documentation of NVML."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetHandleByUUID": "card",
            "nvmlDeviceGetEnforcedPowerLimit": 70_000,
            "nvmlDeviceGetPowerUsage": 69_200,
            "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3_000_000_000),
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=OWN_PID, usedGpuMemory=2_000_000_000)],
            "nvmlDeviceGetClockInfo": 1170,
            "nvmlDeviceGetTemperature": 74,
        }
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            self.calls.append((name, args))
            answer = self.answers[name]
            if answer is Driver.NVMLError:
                raise Driver.NVMLError
            return answer

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    replacement = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", replacement)
    return replacement


def test_nvml_values_become_a_sample_with_units(driver: Driver) -> None:
    card = NvmlDevice("abc-1")
    assert ("nvmlDeviceGetHandleByUUID", ("GPU-abc-1",)) in driver.calls
    assert card.power_limit_watts == 70.0
    assert card.read() == NvmlSample(
        clock_mhz=1170,
        temperature=74,
        power_watts=69.2,
        energy_joules=5000.0,
        used_bytes=3_000_000_000,
        reasons=frozenset({"software power cap"}),
        processes={OWN_PID: 2_000_000_000},
    )
    card.close()
    assert driver.calls[-1][0] == "nvmlShutdown"
    assert card.read() is None


@pytest.mark.parametrize("hidden", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_sample_is_none_if_the_driver_or_the_card_is_not_visible(driver: Driver, hidden: str) -> None:
    driver.answers[hidden] = Driver.NVMLError
    assert NvmlDevice("abc").read() is None


def test_sample_has_none_for_each_value_that_the_driver_does_not_report(driver: Driver) -> None:
    for name in driver.answers:
        if name.startswith("nvmlDeviceGet") and "Handle" not in name:
            driver.answers[name] = Driver.NVMLError
    assert NvmlDevice("abc").read() == NvmlSample()


def test_sample_is_none_without_a_gpu_or_with_an_unknown_uuid() -> None:
    assert NvmlDevice(None).read() is None
    assert NvmlDevice("no-such-card").read() is None  # this uses the real pynvml


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    now = {"wall": 100.0, "cpu": 5.0}
    own = SimpleNamespace(monotonic=lambda: now["wall"], process_time=lambda: now["cpu"])
    monkeypatch.setattr("bench.launch.monitor.time", own)
    return now  # type: ignore[return-value]  # monkeypatch restores the module


def monitor_of(clock: dict[str, float], readings: Sequence[NvmlSample | None]) -> monitor.WorkerMonitor:
    """Return the monitor of a case that has run by a simulated clock: start, samples, probe, samples, checks.

    The samples take 1.5 s before the probe and 0.5 s after it. `readings` are the GPU samples, one for each look.
    """
    remaining = iter(readings)
    worker_monitor = monitor.WorkerMonitor(OWN_PID)
    worker_monitor._card = SimpleNamespace(read=lambda: next(remaining), power_limit_watts=70.0, close=lambda: None)  # type: ignore[assignment]
    worker_monitor._first = NvmlSample(processes={77: None})

    def advance(wall: float, cpu: float) -> None:
        clock["wall"] += wall
        clock["cpu"] += cpu

    advance(0.5, 0.2)
    worker_monitor.enter("samples")
    advance(1.0, 0.005)
    worker_monitor.poll()
    advance(0.5, 0.0025)
    worker_monitor.enter("probe")
    advance(3.0, 1.0)
    worker_monitor.enter("samples")
    advance(0.5, 0.0025)
    worker_monitor.enter("checks")
    return worker_monitor


def reading(joules: float | None, **changes: Any) -> NvmlSample:
    """Return a GPU sample with this state of the energy counter; `changes` replace fields."""
    return replace(
        NvmlSample(1500, 60, 100.0, joules, 4_000_000_000, frozenset(), {OWN_PID: 3_000_000_000, 77: 1}), **changes
    )


def test_harness_share_is_the_cpu_time_of_the_parent_divided_by_the_seconds_of_the_samples(
    clock: dict[str, float],
) -> None:
    result = monitor_of(clock, [None] * 10).add_to(a_result())
    assert result.host is not None
    assert result.host.harness_share == pytest.approx(0.01 / 2.0)
    assert result.host.gpu is None
    assert [moment.phase for moment in result.timeline] == ["start", "samples", "samples", "probe", "samples"]
    assert [moment.at for moment in result.timeline] == [0.5, 1.5, 2.0, 5.0, 5.5]
    assert all((moment.host_bytes or 0) > 1_000_000 for moment in result.timeline)


def test_energy_of_a_case_excludes_the_energy_of_its_probe(clock: dict[str, float]) -> None:
    # The counter by index: 0 at the start, 1 when the samples begin, 2 and 3 during them, 4 after a probe that took
    # 300 J, 5 during the samples again, 6 at their end.
    counters = [0.0, 0.0, 100.0, 150.0, 450.0, 450.0, 500.0]
    result = monitor_of(clock, [reading(joules) for joules in counters]).add_to(a_result())
    assert result.host is not None
    gpu = result.host.gpu
    assert gpu is not None
    assert (gpu.energy_joules, gpu.energy_source) == (200.0, "counter")
    assert stats.joules_an_image(result) == pytest.approx(200.0 / 3)
    assert gpu.others == 1, "process 77 used the card before the worker started"
    assert (result.memory.device_used_bytes, result.memory.device_process_bytes) == (4_000_000_000, 3_000_000_000)


def test_energy_is_integrated_from_the_power_if_there_is_no_energy_counter(clock: dict[str, float]) -> None:
    result = monitor_of(clock, [reading(None)] * 7).add_to(a_result())
    assert result.host is not None
    assert result.host.gpu is not None
    assert (result.host.gpu.energy_joules, result.host.gpu.energy_source) == (200.0, "power")


def test_worker_in_a_container_with_another_pid_is_not_counted_as_another_process(clock: dict[str, float]) -> None:
    readings = [reading(0.0, processes={77: 1, 4711: 1}) for _ in range(7)]
    result = monitor_of(clock, readings).add_to(a_result())
    assert result.host is not None
    assert result.host.gpu is not None
    assert result.host.gpu.others == 1, "one of the two unknown processes is the worker"


def test_gpu_samples_become_median_and_extremes_and_throttling_shares(clock: dict[str, float]) -> None:
    hot = reading(0.0, clock_mhz=900, temperature=91, reasons=frozenset({"hardware thermal slowdown"}))
    result = monitor_of(clock, [reading(0.0)] * 2 + [hot] + [reading(0.0)] * 4).add_to(a_result())
    assert result.host is not None
    gpu = result.host.gpu
    assert gpu is not None
    assert (gpu.clock_mhz_median, gpu.clock_mhz_minimum, gpu.temperature_maximum) == (1500, 900, 91)
    assert gpu.throttled == {"hardware thermal slowdown": pytest.approx(1 / 3)}
    assert gpu.reasons_told is True
    assert gpu.power_limit_watts == 70.0


def test_throttling_share_is_computed_from_the_samples_that_have_throttle_reasons(clock: dict[str, float]) -> None:
    # Some samples, or all of them, may lack the throttle reasons.
    silent, capped = (reading(0.0, reasons=reasons) for reasons in (None, frozenset({"software power cap"})))
    some = monitor_of(clock, [silent] * 2 + [capped] + [silent] * 4).gpu()
    assert some is not None
    assert (some.throttled, some.reasons_told) == ({"software power cap": 1.0}, True)
    none = monitor_of(clock, [silent] * 7).gpu()
    assert none is not None
    assert (none.throttled, none.reasons_told) == ({}, False)


def test_timeline_of_a_long_run_has_a_bounded_number_of_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "_MAX_MOMENTS", 10)
    worker_monitor = monitor.WorkerMonitor(OWN_PID)
    for _ in range(100):
        worker_monitor.poll()
    assert 5 <= len(worker_monitor.add_to(a_result()).timeline) <= 11


CUDA = a_case(device="cuda:0")


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (GpuLoadStats(), None),
        # A card of 70 W computes at its power limit all the time, by design.
        (GpuLoadStats(throttled={"software power cap": 1.0}, others=0), None),
        (
            GpuLoadStats(throttled={"hardware thermal slowdown": 0.4}),
            "throttled 40% of the time (hardware thermal slowdown)",
        ),
        (GpuLoadStats(throttled={"hardware thermal slowdown": 0.05}), None),
        (GpuLoadStats(others=2), "2 other processes used the card"),
    ],
)
def test_result_is_disturbed_if_the_gpu_was_shared_or_throttled_by_heat(gpu: GpuLoadStats, reason: str | None) -> None:
    result = a_result(CUDA, host=replace(a_host(), gpu=gpu))
    trust = disturbance.trust(result)
    assert trust is not None
    assert trust.state == (disturbance.CONTENDED if reason else disturbance.CLEAN)
    assert reason is None or reason in trust.reasons[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"wait_share": 0.004}, None),
        ({"wait_share": 0.3}, "its threads waited 30% of the time for a core"),
        # Threads that are idle, because a part of the work is serial, are no disturbance.
        ({"wait_share": 0.0, "cpu_share": 0.6}, None),
        ({"wait_share": None, "cpu_share": 0.6}, "it used only 60% of the time of its 2 threads"),
        ({"wait_share": None, "pressure_share": 0.4}, "some process waited 40% of the time for a core"),
        ({"steal_share": 0.2}, "the hypervisor took 20% of the CPU time"),
    ],
)
def test_result_is_disturbed_if_the_worker_waited_for_cores_or_lost_cpu_time(
    changes: dict[str, Any], reason: str | None
) -> None:
    trust = disturbance.trust(a_result(host=replace(a_host(), **changes)))
    assert trust is not None
    assert trust.reasons == ((reason,) if reason else ())


def test_trust_is_none_for_a_result_without_samples_or_host_load() -> None:
    assert disturbance.trust(a_result(samples=())) is None
    assert disturbance.trust(a_result(host=None)) is None


def test_throttle_reasons_that_mean_a_fault_are_known_to_nvml() -> None:
    assert set(nvml.REASONS.values()) >= nvml.FAULT_REASONS
