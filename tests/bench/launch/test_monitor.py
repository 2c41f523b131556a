"""What the parent sees of a worker, and of a card by recorded answers of its driver's library."""

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
from bench.run import verdict
from tests.bench.conftest import a_case, a_host, a_result

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ME = os.getpid()


class Driver(ModuleType):
    """pynvml with the answers of a T4 under its power cap, as its fields are documented."""

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
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=ME, usedGpuMemory=2_000_000_000)],
            "nvmlDeviceGetClockInfo": 1170,
            "nvmlDeviceGetTemperature": 74,
        }
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def ask(*args: Any) -> Any:
            self.asked.append((name, args))
            answer = self.answers[name]
            if answer is Driver.NVMLError:
                raise Driver.NVMLError
            return answer

        return ask


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


def test_a_card_tells_of_itself(driver: Driver) -> None:
    card = NvmlDevice("abc-1")
    assert ("nvmlDeviceGetHandleByUUID", ("GPU-abc-1",)) in driver.asked
    assert card.power_limit_watts == 70.0
    assert card.read() == NvmlSample(
        clock_mhz=1170,
        temperature=74,
        power_watts=69.2,
        energy_joules=5000.0,
        used_bytes=3_000_000_000,
        reasons=frozenset({"software power cap"}),
        processes={ME: 2_000_000_000},
    )
    card.close()
    assert driver.asked[-1][0] == "nvmlShutdown"
    assert card.read() is None


@pytest.mark.parametrize("hidden", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_where_the_driver_is_hidden_nothing_is_made_up(driver: Driver, hidden: str) -> None:
    driver.answers[hidden] = Driver.NVMLError
    assert NvmlDevice("abc").read() is None


def test_what_a_card_does_not_tell_is_none(driver: Driver) -> None:
    for name in driver.answers:
        if name.startswith("nvmlDeviceGet") and "Handle" not in name:
            driver.answers[name] = Driver.NVMLError
    assert NvmlDevice("abc").read() == NvmlSample()


def test_without_a_card_and_without_a_driver_nothing_is_asked() -> None:
    assert NvmlDevice(None).read() is None
    assert NvmlDevice("no-such-card").read() is None  # the real library, on a machine that may have none


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    now = {"wall": 100.0, "cpu": 5.0}
    own = SimpleNamespace(monotonic=lambda: now["wall"], process_time=lambda: now["cpu"])
    monkeypatch.setattr("bench.launch.monitor.time", own)
    return now  # type: ignore[return-value]  # nothing is to be put back


def watch_of(clock: dict[str, float], readings: Sequence[NvmlSample | None]) -> monitor.WorkerMonitor:
    """A watch over a whole case: half a second before, two seconds of images with a pause between, and the end."""
    turns = iter(readings)
    watch = monitor.WorkerMonitor(ME)
    watch._card = SimpleNamespace(read=lambda: next(turns), power_limit_watts=70.0, close=lambda: None)  # type: ignore[assignment]
    watch._first = NvmlSample(processes={77: None})

    def pass_by(wall: float, cpu: float) -> None:
        clock["wall"] += wall
        clock["cpu"] += cpu

    pass_by(0.5, 0.2)
    watch.enter("samples")
    pass_by(1.0, 0.005)
    watch.look()
    pass_by(0.5, 0.0025)
    watch.enter("probe")
    pass_by(3.0, 1.0)
    watch.enter("samples")
    pass_by(0.5, 0.0025)
    watch.enter("checks")
    return watch


def reading(joules: float | None, **changes: Any) -> NvmlSample:
    return replace(
        NvmlSample(1500, 60, 100.0, joules, 4_000_000_000, frozenset(), {ME: 3_000_000_000, 77: 1}), **changes
    )


def test_what_the_parent_itself_costs_is_counted_while_images_are_made(clock: dict[str, float]) -> None:
    result = watch_of(clock, [None] * 10).add_to(a_result())
    assert result.host is not None
    assert result.host.harness_share == pytest.approx(0.01 / 2.0)
    assert result.host.gpu is None
    assert [moment.phase for moment in result.timeline] == ["start", "samples", "samples", "probe", "samples"]
    assert [moment.at for moment in result.timeline] == [0.5, 1.5, 2.0, 5.0, 5.5]
    assert all((moment.host_bytes or 0) > 1_000_000 for moment in result.timeline)


def test_energy_is_of_the_images_alone(clock: dict[str, float]) -> None:
    # 0: start; 1: samples begin; 2, 3: images; 4: a probe took 300 J; 5: images again; 6: their end.
    counters = [0.0, 0.0, 100.0, 150.0, 450.0, 450.0, 500.0]
    result = watch_of(clock, [reading(each) for each in counters]).add_to(a_result())
    assert result.host is not None
    gpu = result.host.gpu
    assert gpu is not None
    assert (gpu.energy_joules, gpu.energy_source) == (200.0, "counter")
    assert stats.joules_an_image(result) == pytest.approx(200.0 / 3)
    assert gpu.others == 1, "77 was there before"
    assert (result.memory.device_used_bytes, result.memory.device_process_bytes) == (4_000_000_000, 3_000_000_000)


def test_without_a_counter_power_is_integrated(clock: dict[str, float]) -> None:
    result = watch_of(clock, [reading(None)] * 7).add_to(a_result())
    assert result.host is not None
    assert result.host.gpu is not None
    assert (result.host.gpu.energy_joules, result.host.gpu.energy_source) == (200.0, "power")


def test_in_a_container_the_worker_has_another_number(clock: dict[str, float]) -> None:
    named = [reading(0.0, processes={77: 1, 4711: 1}) for _ in range(7)]
    result = watch_of(clock, named).add_to(a_result())
    assert result.host is not None
    assert result.host.gpu is not None
    assert result.host.gpu.others == 1, "one of the two that are not ours is the worker itself"


def test_the_readings_of_a_card_are_summed_up(clock: dict[str, float]) -> None:
    hot = reading(0.0, clock_mhz=900, temperature=91, reasons=frozenset({"hardware thermal slowdown"}))
    result = watch_of(clock, [reading(0.0)] * 2 + [hot] + [reading(0.0)] * 4).add_to(a_result())
    assert result.host is not None
    gpu = result.host.gpu
    assert gpu is not None
    assert (gpu.clock_mhz_median, gpu.clock_mhz_minimum, gpu.temperature_maximum) == (1500, 900, 91)
    assert gpu.throttled == {"hardware thermal slowdown": pytest.approx(1 / 3)}
    assert gpu.reasons_told is True
    assert gpu.power_limit_watts == 70.0


def test_a_look_that_tells_no_reason_is_none_without_one(clock: dict[str, float]) -> None:
    """Some looks fail, or all: a share is of those that told."""
    silent, capped = (reading(0.0, reasons=reasons) for reasons in (None, frozenset({"software power cap"})))
    some = watch_of(clock, [silent] * 2 + [capped] + [silent] * 4).gpu()
    assert some is not None
    assert (some.throttled, some.reasons_told) == ({"software power cap": 1.0}, True)
    none = watch_of(clock, [silent] * 7).gpu()
    assert none is not None
    assert (none.throttled, none.reasons_told) == ({}, False)


def test_a_long_run_is_kept_with_fewer_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "_MOST_MOMENTS", 10)
    watch = monitor.WorkerMonitor(ME)
    for _ in range(100):
        watch.look()
    assert 5 <= len(watch.add_to(a_result()).timeline) <= 11


CUDA = a_case(device="cuda:0")


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (GpuLoadStats(), None),
        # A card of 70 W is at its cap all day: that is how it is sold.
        (GpuLoadStats(throttled={"software power cap": 1.0}, others=0), None),
        (
            GpuLoadStats(throttled={"hardware thermal slowdown": 0.4}),
            "slowed down 40% of the time (hardware thermal slowdown)",
        ),
        (GpuLoadStats(throttled={"hardware thermal slowdown": 0.05}), None),
        (GpuLoadStats(others=2), "2 other processes used the card"),
    ],
)
def test_a_card_that_is_not_its_own_or_not_well_is_told(gpu: GpuLoadStats, reason: str | None) -> None:
    result = a_result(CUDA, host=replace(a_host(), gpu=gpu))
    found = verdict.trust(result)
    assert found is not None
    assert found.state == (verdict.CONTENDED if reason else verdict.CLEAN)
    assert reason is None or reason in found.reasons[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"wait_share": 0.004}, None),
        ({"wait_share": 0.3}, "its threads waited 30% of the time for a core"),
        # Serial work between the threads' is no contention: waiting is what tells.
        ({"wait_share": 0.0, "cpu_share": 0.6}, None),
        ({"wait_share": None, "cpu_share": 0.6}, "it had 60% of its 2 threads"),
        ({"wait_share": None, "pressure_share": 0.4}, "something waited 40% of the time for a core"),
        ({"steal_share": 0.2}, "the hypervisor took 20% of the CPU time"),
    ],
)
def test_a_machine_that_others_use_is_told(changes: dict[str, Any], reason: str | None) -> None:
    found = verdict.trust(a_result(host=replace(a_host(), **changes)))
    assert found is not None
    assert found.reasons == ((reason,) if reason else ())


def test_no_figures_no_trust() -> None:
    assert verdict.trust(a_result(samples=())) is None
    assert verdict.trust(a_result(host=None)) is None


def test_every_reason_that_is_unwell_has_a_bit() -> None:
    assert set(nvml.REASONS.values()) >= nvml.FAULT_REASONS
