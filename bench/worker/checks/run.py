"""Examines one device in phases, each with its share of the time, and repeats phases upon a control line."""

from __future__ import annotations

import contextlib
import platform
import time
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.core.validation_records import PROCESS, Reading
from bench.core.worker_events import CardOpened, DeviceExamined, ExaminationReport, PhaseEntered, ReadingTaken
from bench.core.worker_requests import WAITING, decode_repeat_phases
from bench.worker import host_load
from bench.worker.checks import compute, copies, memory_patterns, sampling_speed
from bench.worker.checks import device as checked_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bench.core.result import Host
    from bench.core.worker_events import Emit
    from bench.core.worker_requests import Examination
    from bench.worker.checks.device import Device

if TYPE_CHECKING:
    Probe = Callable[[Device, float], Iterator[Reading]]


class Phase(NamedTuple):
    """Hold the check of a phase, and the parts of the time that it gets on a CPU and on a GPU.

    With 0 it does not run there.
    """

    cpu_parts: float
    gpu_parts: float
    probe: Probe


# {phase: its check}, in the order of execution. The parts add up to 100 and divide the time left after the imports. A
# phase that does not run or ends early leaves its time to later phases. Of a one-minute examination of a GPU, the time
# left is about 50 s.
CHECKS: dict[str, Phase] = {
    # Three small computations per dtype, and their float64 references on the host: a few seconds at most.
    "numerics": Phase(4, 10, compute.numerics),
    # The verdict depends most on products. There are up to five dtypes; in one second each, the fastest shape is found.
    "product": Phase(16, 18, compute.product),
    "convolution": Phase(8, 8, compute.convolution),
    # The bandwidth varies from copy to copy, so tens of short copies are timed.
    "copy": Phase(4, 6, copies.copy),
    "pinned": Phase(0, 5, copies.pinned),
    # Nearly all free memory of a GPU is tested with four patterns. The memory of a host is slower and larger, so only a
    # part of it is tested.
    "memory": Phase(12, 16, memory_patterns.memory),
    # A GPU heats up slowly, so this phase is its longest. The clock of a CPU is not monitored.
    "sustained": Phase(14, 19, compute.sustained),
    "threads": Phase(5, 0, compute.threads),
    # On a CPU, building the models takes about four seconds, and three of the four loops about three seconds each.
    "loop": Phase(37, 18, sampling_speed.loop),
}


def examine(request: Examination, emit: Emit, lines: Iterable[str]) -> None:
    """Examine a device and emit its readings; then repeat phases, one control line at a time.

    Args:
        request: the device, the time budget and the phases.
        emit: called with each event.
        lines: the control lines of the parent ("again SECONDS PHASE ..."); any other line ends the examination.

    Raises:
        ValueError: a phase is unknown.
    """
    unknown = sorted(set(request.probes) - set(CHECKS))
    if unknown:
        raise ValueError(f"there is no phase {unknown[0]!r}; the phases are: {', '.join(CHECKS)}")
    emit(PhaseEntered("imports"))
    import torch

    try:
        examiner = _Examiner(torch, request, emit)
    except RuntimeError as error:
        # A GPU that is full, or used exclusively by another process, is not faulty. After any other error this process
        # ends, and the parent starts another one.
        reading = checked_device.with_error(Reading("start", PROCESS, request.device, "", None), error)
        if reading.fault is not None:
            raise
        emit(ReadingTaken(reading))
        emit(PhaseEntered(WAITING))
        for _ in lines:
            emit(PhaseEntered(WAITING))
        return
    examiner.run(request.probes or tuple(CHECKS), examiner.left())
    examiner.wait()
    for line in lines:
        again = decode_repeat_phases(line)
        if again is None:
            break
        examiner.run(again.phases, again.seconds)
        examiner.wait()


class _LoadMeter:
    """Measure the host load and the worker's own CPU time during the bursts of sustained load."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self._host_load = host_load.HostLoad()
        self._used = self._passed = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Add the load during this context to the load that was measured before; one context is used per burst."""
        with self._host_load.watched():
            cpu_began, began = time.process_time(), time.perf_counter()
            try:
                yield
            finally:
                self._used += time.process_time() - cpu_began
                self._passed += time.perf_counter() - began

    def host(self, threads: int) -> Host:
        """Return the host load during all bursts; `threads` is the number of torch's threads."""
        return self._host_load.host(threads, self._used, self._passed)


class _Examiner:
    """Run the phases of one device, and record their seconds."""

    def __init__(self, torch: Any, request: Examination, emit: Emit) -> None:
        """Send the UUID of a GPU to the parent, and initialize the device."""
        self._torch, self._request, self._emit = torch, request, emit
        torch.set_grad_enabled(False)
        if request.device.startswith("cuda"):  # the parent opens the GPU before the driver lists this process on it
            emit(CardOpened(str(getattr(torch.cuda.get_device_properties(request.device), "uuid", ""))))
        self._device = checked_device.access(torch, request.device)
        self._load_meter = _LoadMeter()
        self._rates: dict[str, float] = {}  # {dtype: FLOPs a second of the convolution}
        if self._device.is_card:
            torch.zeros(1, device=request.device)  # the driver initializes the GPU here, before the first phase
            self._device.wait()
        self._seconds = {"imports": time.time() - request.asked_at}
        self._ends = time.perf_counter() + request.budget_seconds - self._seconds["imports"]

    def left(self) -> float:
        """Return the seconds left for the whole examination."""
        return self._ends - time.perf_counter()

    def run(self, phases: Iterable[str], seconds: float) -> None:
        """Run some phases in the order of CHECKS; together they take at most `seconds`."""
        ends = time.perf_counter() + seconds
        selected = set(phases)
        parts = {name: self._part(name) for name in CHECKS if name in selected and self._part(name)}
        rest = sum(parts.values())
        for name, part in parts.items():
            began = time.perf_counter()
            self._run_phase(name, began + max(0.0, ends - began) * part / rest)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            rest -= part

    def wait(self) -> None:
        """Send the report and enter the phase WAITING; the parent may end the worker while it waits."""
        host = self._load_meter.host(self._torch.get_num_threads())
        self._emit(DeviceExamined(ExaminationReport(host, self._software(), dict(self._seconds))))
        self._emit(PhaseEntered(WAITING))

    def _part(self, name: str) -> float:
        return CHECKS[name].gpu_parts if self._device.is_card else CHECKS[name].cpu_parts

    def _run_phase(self, name: str, until: float) -> None:
        self._emit(PhaseEntered(name))
        probe = CHECKS[name].probe
        if name == "sustained":
            probe = partial(compute.sustained, around=self._load_meter.watched)
        elif name == "loop":
            probe = partial(sampling_speed.loop, known=self._rates)
        try:
            for reading in probe(self._device, until):
                if name == "convolution" and reading.value is not None:
                    self._rates[reading.name.rpartition(" ")[2]] = reading.value
                self._emit(ReadingTaken(reading))
        except Exception as error:  # for example, the driver has lost the GPU; the other phases still run
            blank = Reading(name, name, self._device.name, "", None)
            self._emit(ReadingTaken(checked_device.with_error(blank, error)))

    def _software(self) -> dict[str, str]:
        torch, device = self._torch, self._request.device
        software = {"python": platform.python_version(), "torch": torch.__version__}
        with contextlib.suppress(metadata.PackageNotFoundError):
            software["diffusers"] = metadata.version("diffusers")
        if not self._device.is_card:
            return software | {"cpu": torch.backends.cpu.get_cpu_capability()}
        return software | {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "device": torch.cuda.get_device_name(device),
        }
