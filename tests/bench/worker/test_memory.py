"""Tests the clocks, the memory readings and the host load of a worker."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from bench.core.result import Memory
from bench.worker import device_timers, host_load, memory
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def test_host_clock_returns_the_seconds_of_a_loop_and_of_the_steps_between_its_marks() -> None:
    times = iter([10.0, 11.0, 13.0, 16.0, 20.0])
    clock = device_timers.HostClock(lambda: next(times))
    clock.start()
    for _ in range(3):
        clock.mark()
    assert clock.stop() == (10.0, (2.0, 3.0))


def test_host_clock_can_time_a_second_loop() -> None:
    times = iter(float(second) for second in range(100))
    clock = device_timers.HostClock(lambda: next(times))
    for _ in range(2):
        clock.start()
        clock.mark()
        clock.mark()
        assert clock.stop() == (3.0, (1.0,))


def test_host_clock_returns_no_steps_for_a_loop_without_marks() -> None:
    times = iter([1.0, 3.5])
    clock = device_timers.HostClock(lambda: next(times))
    clock.start()
    assert clock.stop() == (2.5, ())


class Cuda:
    """Stands in for torch.cuda, and records the calls in order. Event number n has the time n squared milliseconds."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.events = 0

    def synchronize(self, device: str) -> None:
        self.calls.append(f"synchronize {device}")

    def current_stream(self, device: str) -> str:
        return f"stream of {device}"

    def Event(self, *, enable_timing: bool) -> Event:  # noqa: N802 (torch's name)
        assert enable_timing
        self.events += 1
        return Event(self, self.events)


class Event:
    def __init__(self, cuda: Cuda, number: int) -> None:
        self.cuda = cuda
        self.number = number

    def record(self, stream: str) -> None:
        self.cuda.calls.append(f"event {self.number} on {stream}")

    def elapsed_time(self, end: Event) -> float:
        self.cuda.calls.append(f"read {self.number} {end.number}")
        return float(end.number**2 - self.number**2)


def test_cuda_clock_synchronizes_only_at_the_start_and_the_end_of_a_loop() -> None:
    cuda = Cuda()
    clock = device_timers.CudaClock(SimpleNamespace(cuda=cuda), "cuda:1")
    clock.start()
    for _ in range(3):
        clock.mark()
    whole, steps = clock.stop()
    assert cuda.calls == [
        "synchronize cuda:1",
        "event 1 on stream of cuda:1",
        "event 2 on stream of cuda:1",
        "event 3 on stream of cuda:1",
        "synchronize cuda:1",
        "read 1 2",
        "read 2 3",
    ]
    assert steps == (0.003, 0.005)  # milliseconds are converted to seconds
    assert whole > 0


def test_cuda_clock_can_time_a_second_loop() -> None:
    clock = device_timers.CudaClock(SimpleNamespace(cuda=Cuda()), "cuda:0")
    for expected in (0.003, 0.007):
        clock.start()
        clock.mark()
        clock.mark()
        assert clock.stop()[1] == (expected,)


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", device_timers.HostClock), ("cuda:0", device_timers.CudaClock), ("cuda:7", device_timers.CudaClock)],
)
def test_clock_of_a_cpu_is_the_host_clock_and_of_a_gpu_the_cuda_clock(device: str, kind: type) -> None:
    assert isinstance(device_timers.clock_for(SimpleNamespace(cuda=Cuda()), device), kind)


# Runs in a new process, because earlier tests have raised the peak memory of this one. mmap returns its memory to the
# system at once; Python objects need not.
PEAKS = """
import json, mmap
from bench.worker import memory as device_memory

def grow(size):
    area = mmap.mmap(-1, size)
    for offset in range(0, size, 4096):
        area[offset] = 1
    area.close()

start = device_memory.host_peak_bytes()
grow(192 << 20)
high = device_memory.host_peak_bytes()
reset = device_memory.reset_host_peak()
low = device_memory.host_peak_bytes()
grow(64 << 20)
print(json.dumps([start, high, reset, low, device_memory.host_peak_bytes()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_host_peak_after_a_reset_is_that_of_the_second_phase() -> None:
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, env=environment)
    start, high, reset, low, second = json.loads(done.stdout)
    assert reset is True
    assert high - start > 180 * MIB
    assert high - low > 180 * MIB, "the reset did not lower the peak"
    assert 60 * MIB < second - low < 100 * MIB, "the second phase has the peak of the first"


def test_host_peak_is_none_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SELF", tmp_path / "absent")
    assert memory.host_peak_bytes() is None
    assert memory.reset_host_peak() is False


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 16_000 * 1024),
        ({"cgroup/memory.max": "max\n", "cgroup/memory.current": "5\n"}, 16_000 * 1024),
        ({"cgroup/memory.max": "9000\n", "cgroup/memory.current": "5000\n"}, 4000),
        (
            {
                "cgroup/memory.max": "9000",
                "cgroup/memory.current": "8500",
                "cgroup/memory.stat": "anon 1\ninactive_file 700\n",
            },
            1200,
        ),
        (
            {
                "proc/cgroup": "4:cpu,memory:/a\n0::/slice/job\n",
                "cgroup/slice/memory.max": "7000\n",
                "cgroup/slice/memory.current": "6000\n",
                "cgroup/slice/job/memory.max": "9000\n",
                "cgroup/slice/job/memory.current": "6000\n",
            },
            1000,
        ),
        (
            {
                "proc/cgroup": "4:memory:/job\n0::/\n",
                "cgroup/memory/job/memory.limit_in_bytes": "9000\n",
                "cgroup/memory/job/memory.usage_in_bytes": "2000\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/memory.usage_in_bytes": "90000\n",
            },
            7000,
        ),
    ],
)
def test_free_memory_is_the_least_of_the_machine_and_all_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int
) -> None:
    for name, text in ({"proc/meminfo": "MemAvailable:   16000 kB\n"} | files).items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(memory, "_SELF", tmp_path / "proc")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "proc/meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    assert memory.free_bytes() == free


def test_memory_peaks_are_left_out_if_the_peak_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "reset_host_peak", lambda: False)
    peaks = memory.Peaks(SimpleNamespace(), "cpu")
    peaks.pause()
    assert peaks.memory() == Memory()


def test_memory_peaks_do_not_count_the_memory_used_during_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    host, allocated, reserved = iter([100, 90]), iter([5, 7]), iter([6, 60])
    resets: list[str] = []
    monkeypatch.setattr(memory, "reset_host_peak", lambda: True)
    monkeypatch.setattr(memory, "host_peak_bytes", lambda: next(host))
    cuda = SimpleNamespace(
        max_memory_allocated=lambda _: next(allocated),
        max_memory_reserved=lambda _: next(reserved),
        reset_peak_memory_stats=resets.append,
        empty_cache=lambda: resets.append("empty"),
    )
    peaks = memory.Peaks(SimpleNamespace(cuda=cuda), "cuda:2")
    for _ in range(2):
        peaks.pause()
        peaks.resume()
    # After a pause, the allocator also reserves memory for the probe. So the reserved peak is the first reading.
    assert peaks.memory() == Memory(
        host_run_peak_bytes=100, device_peak_allocated_bytes=7, device_peak_reserved_bytes=6
    )
    assert resets == ["empty", *["cuda:2"] * 3]


def test_memory_peaks_reset_the_allocator_of_a_cuda_device_and_not_of_a_cpu() -> None:
    resets_of: list[str] = []
    torch = SimpleNamespace(cuda=SimpleNamespace(reset_peak_memory_stats=resets_of.append, empty_cache=lambda: None))
    memory.Peaks(torch, "cpu")
    memory.Peaks(torch, "cuda:2")
    assert resets_of == ["cuda:2"]


def test_uss_peak_includes_the_memory_that_this_process_allocates() -> None:
    before = memory.uss_bytes()
    assert before is not None
    block = bytearray(os.urandom(1 << 20) * 64)
    with memory.UssPeak() as peak:
        assert block[-1] is not None
    assert peak.bytes is not None
    assert peak.bytes - before > 32 << 20
    assert (memory.rss_bytes() or 0) > peak.bytes / 2


def test_queue_clock_waits_for_the_device_at_the_start_and_the_end_of_a_loop() -> None:
    times, waits = itertools.count(), []
    clock = device_timers.QueueClock(lambda: waits.append(0), lambda: float(next(times)))
    clock.start()
    clock.mark()
    assert clock.stop() == (1.0, ())
    assert len(waits) == 2


def test_shares_of_waiting_for_a_core_are_measured_only_inside_the_watched_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = tmp_path / "self" / "task" / "7"
    thread.mkdir(parents=True)
    (tmp_path / "pressure").write_text("some avg10=0.00 avg60=0.51 avg300=2.25 total=1000000\nfull total=0\n")
    (thread / "schedstat").write_text("5000000000 1000000000 9\n")
    monkeypatch.setattr(host_load, "_SELF", tmp_path / "self")
    monkeypatch.setattr(host_load, "_PRESSURE", tmp_path / "pressure")
    times = iter([100.0, 104.0])
    monkeypatch.setattr("bench.worker.host_load.time", SimpleNamespace(monotonic=lambda: next(times)))
    load = host_load.HostLoad()
    with load.watched():
        (tmp_path / "pressure").write_text("some avg10=0.00 avg60=0.51 avg300=2.25 total=3000000\n")
        (thread / "schedstat").write_text("9000000000 5000000000 9\n")
    (thread / "schedstat").write_text("9000000000 99000000000 9\n")
    host = load.host(threads=2, cpu_seconds=4.0, wall_seconds=4.0)
    assert (host.pressure_share, host.wait_share) == (0.5, 0.5)


def test_wait_share_is_relative_to_the_busy_thread_and_not_to_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a loop on a GPU: torch may use 64 threads, and only one works. It waits half of its time for a core.
    thread = tmp_path / "self" / "task" / "7"
    thread.mkdir(parents=True)
    (thread / "schedstat").write_text("0 0 9\n")
    monkeypatch.setattr(host_load, "_SELF", tmp_path / "self")
    load = host_load.HostLoad()
    with load.watched():
        (thread / "schedstat").write_text("5000000000 5000000000 9\n")
    assert load.host(threads=64, cpu_seconds=5.0, wall_seconds=10.0).wait_share == 0.5


def test_steal_share_is_relative_to_the_busy_cores_and_not_to_all_cores(stat: Path) -> None:
    load = host_load.HostLoad()
    with load.watched():  # 64 cores, of which one works and loses a third of its time
        stat.write_text("cpu 200 0 100 7100 0 0 0 100 0 0\n")
    assert load.host(threads=64, cpu_seconds=1.0, wall_seconds=1.0).steal_share == pytest.approx(1 / 3)


def test_wait_and_pressure_shares_are_none_if_the_kernel_does_not_report_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_load, "_SELF", tmp_path / "absent")
    monkeypatch.setattr(host_load, "_PRESSURE", tmp_path / "absent")
    load = host_load.HostLoad()
    with load.watched():
        pass
    host = load.host(threads=2, cpu_seconds=4.0, wall_seconds=4.0)
    assert (host.pressure_share, host.wait_share) == (None, None)


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a file that stands in for /proc/stat.

    Its columns are user nice system idle iowait irq softirq steal guest guest_nice.
    """
    file = tmp_path / "stat"
    file.write_text("cpu 100 0 100 800 0 0 0 50 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(host_load, "_STAT", file)
    return file


def test_steal_share_is_measured_only_inside_the_watched_block(stat: Path) -> None:
    load = host_load.HostLoad()
    with load.watched():
        # 100 more ticks: 20 stolen, 10 idle. Guest time is a part of user time, and must not count twice.
        stat.write_text("cpu 160 0 110 810 0 0 0 70 999 0\n")
    stat.write_text("cpu 160 0 110 810 0 0 0 900 999 0\n")
    host = load.host(threads=4, cpu_seconds=6.0, wall_seconds=2.0)
    assert host.steal_share == pytest.approx(20 / 90), "10 of the ticks were idle"
    assert host.cpu_share == pytest.approx(0.75)
    assert host.threads == 4


def test_cpu_and_steal_shares_are_none_for_zero_seconds(stat: Path) -> None:
    host = host_load.HostLoad().host(threads=2, cpu_seconds=0.0, wall_seconds=0.0)
    assert host.cpu_share is None
    assert host.steal_share is None


@pytest.mark.parametrize("text", [None, "", "cpu 1 2 3\n"], ids=["absent", "empty", "columns of an old kernel"])
def test_steal_share_is_none_if_proc_stat_is_absent_empty_or_short(stat: Path, text: str | None) -> None:
    if text is None:
        stat.unlink()
    else:
        stat.write_text(text)
    load = host_load.HostLoad()
    with load.watched():
        pass
    host = load.host(threads=2, cpu_seconds=1.0, wall_seconds=1.0)
    assert host.steal_share is None
    assert host.cpu_share == 0.5
