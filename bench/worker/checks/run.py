"""Examines one device: asks the probes in phases, each within its share of the time, and some again at a word."""

from __future__ import annotations

import contextlib
import platform
import time
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.core.protocol import WAITING, decode_again
from bench.core.validation_records import PROCESS, Reading
from bench.core.worker_events import CardOpened, DeviceExamined, ExaminationReport, PhaseEntered, ReadingTaken
from bench.worker import host_load
from bench.worker.checks import compute, copies, memory_patterns, sampling_speed
from bench.worker.checks import device as checked_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bench.core.protocol import Examination
    from bench.core.result import Host
    from bench.core.worker_events import Emit
    from bench.worker.checks.device import Device

if TYPE_CHECKING:
    Probe = Callable[[Device, float], Iterator[Reading]]


class Phase(NamedTuple):
    """A phase's parts of the time on a CPU and on a card, 0 where it has none; and what is asked in it."""

    on_a_cpu: float
    on_a_card: float
    probe: Probe


# In their order, of 100 parts of what is left after the imports. What is not asked for, or ends early, leaves its parts
# to those after it. On a card the parts are near the seconds of a verdict within a minute.
CHECKS: dict[str, Phase] = {
    # Three small questions a dtype, and the float64 that they are held against is the host's: seconds at most.
    "numerics": Phase(4, 10, compute.numerics),
    # What the verdict hangs on: up to five dtypes, and a second each finds the best shape.
    "product": Phase(16, 18, compute.product),
    "convolution": Phase(8, 8, compute.convolution),
    # Bandwidth flutters: it takes tens of copies, and they are short.
    "copy": Phase(4, 6, copies.copy),
    "pinned": Phase(0, 5, copies.pinned),
    # As much as a card has is looked at four times; a host's memory is slower and larger, and a part of it has to do.
    "memory": Phase(12, 16, memory_patterns.memory),
    # Heat takes its time: the longest on a card. A CPU has no clock that could be watched beside it.
    "sustained": Phase(14, 19, compute.sustained),
    "threads": Phase(5, 0, compute.threads),
    # On a CPU, building takes the first four seconds, and three of the four loops some three each.
    "loop": Phase(37, 18, sampling_speed.loop),
}


def examine(request: Examination, emit: Emit, lines: Iterable[str]) -> None:
    """Examine a device and emit its readings; then run phases again, one control line at a time.

    Args:
        request: the device, the budget and the phases.
        emit: receives each event.
        lines: the control lines of the parent ("again SECONDS PHASE ..."); any other line ends the examination.

    Raises:
        ValueError: a phase is unknown.
    """
    unknown = sorted(set(request.probes) - set(CHECKS))
    if unknown:
        raise ValueError(f"there is no phase {unknown[0]!r}; there is: {', '.join(CHECKS)}")
    emit(PhaseEntered("imports"))
    import torch

    try:
        examiner = _Examiner(torch, request, emit)
    except RuntimeError as error:
        # A card that others fill, or hold alone, is well. Of anything else this process dies, and is made again.
        found = checked_device.stopped(Reading("start", PROCESS, request.device, "", None), error)
        if found.fault is not None:
            raise
        emit(ReadingTaken(found))
        emit(PhaseEntered(WAITING))
        for _ in lines:
            emit(PhaseEntered(WAITING))
        return
    examiner.ask(request.probes or tuple(CHECKS), examiner.left())
    examiner.wait()
    for line in lines:
        again = decode_again(line)
        if again is None:
            break
        examiner.ask(again.phases, again.seconds)
        examiner.wait()


class _Load:
    """What the rest of the host does while the device is under load, and what of it is our own work."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._neighbours = host_load.HostLoad()
        self._used = self._passed = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count what happens within; enter it anew for each burst."""
        with self._neighbours.watched():
            used, began = time.process_time(), time.perf_counter()
            try:
                yield
            finally:
                self._used += time.process_time() - used
                self._passed += time.perf_counter() - began

    def host(self, threads: int) -> Host:
        """What was seen."""
        return self._neighbours.host(threads, self._used, self._passed)


class _Examiner:
    """One device, its phases, and how long they took."""

    def __init__(self, torch: Any, request: Examination, emit: Emit) -> None:
        """Make the device ready."""
        self._torch, self._request, self._emit = torch, request, emit
        torch.set_grad_enabled(False)
        if request.device.startswith("cuda"):  # before this process is one of those on the card
            emit(CardOpened(str(getattr(torch.cuda.get_device_properties(request.device), "uuid", ""))))
        self._device = checked_device.of(torch, request.device)
        self._load = _Load()
        self._rates: dict[str, float] = {}  # of convolutions, by dtype
        if self._device.is_card:
            torch.zeros(1, device=request.device)  # the driver makes the card ready: in no probe's time
            self._device.wait()
        self._seconds = {"imports": time.time() - request.asked_at}
        self._ends = time.perf_counter() + request.budget_seconds - self._seconds["imports"]

    def left(self) -> float:
        """Seconds of the whole plan."""
        return self._ends - time.perf_counter()

    def ask(self, wanted: Iterable[str], seconds: float) -> None:
        """Ask phases, of which all together take that time."""
        ends = time.perf_counter() + seconds
        parts = {name: self._part(name) for name in CHECKS if name in set(wanted) and self._part(name)}
        rest = sum(parts.values())
        for name, part in parts.items():
            began = time.perf_counter()
            self._ask(name, began + max(0.0, ends - began) * part / rest)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            rest -= part

    def wait(self) -> None:
        """Emit the report each time before the worker waits: it may be the last one."""
        host = self._load.host(self._torch.get_num_threads())
        self._emit(DeviceExamined(ExaminationReport(host, self._software(), dict(self._seconds))))
        self._emit(PhaseEntered(WAITING))

    def _part(self, name: str) -> float:
        return CHECKS[name].on_a_card if self._device.is_card else CHECKS[name].on_a_cpu

    def _ask(self, name: str, until: float) -> None:
        self._emit(PhaseEntered(name))
        probe = CHECKS[name].probe
        if name == "sustained":
            probe = partial(compute.sustained, around=self._load.watched)
        elif name == "loop":
            probe = partial(sampling_speed.loop, known=self._rates)
        try:
            for reading in probe(self._device, until):
                if name == "convolution" and reading.value is not None:
                    self._rates[reading.name.rpartition(" ")[2]] = reading.value
                self._emit(ReadingTaken(reading))
        except Exception as error:  # such as that of a card that is lost: the other phases are asked all the same
            blank = Reading(name, name, self._device.name, "", None)
            self._emit(ReadingTaken(checked_device.stopped(blank, error)))

    def _software(self) -> dict[str, str]:
        torch, device = self._torch, self._request.device
        found = {"python": platform.python_version(), "torch": torch.__version__}
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["diffusers"] = metadata.version("diffusers")
        if not self._device.is_card:
            return found | {"cpu": torch.backends.cpu.get_cpu_capability()}
        return found | {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "device": torch.cuda.get_device_name(device),
        }
