"""Short questions to a machine: what torch can use, and how fast a dtype is before a case is priced."""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.core.axes import DTYPES
from bench.core.errors import is_unsupported
from bench.core.worker_events import (
    CapabilitiesRead,
    DeviceCapabilities,
    PhaseEntered,
    PrecisionProbe,
    PrecisionProbed,
)
from bench.worker import clocks, components

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.protocol import PrecisionQuery
    from bench.core.worker_events import Emit

_AMPERE = (8, 0)
_CALLS = 4
_ENOUGH_SECONDS = 0.02
_PATIENCE_SECONDS = 1.0
_LANES = {"AVX512": 16, "AVX2": 8, "SVE256": 8}  # numbers of fp32 that an instruction takes
_FINE_SECONDS = 1e-4  # a coarser clock (Windows counts CPU time in 1/64 s) cannot time a call
_PROBE_SECONDS = 0.02
_ASK_SECONDS = 0.05
_MOST_ASKS = 5
_COPY_BYTES = 256 << 20  # what lies in no cache: of 64 MB two kinds of placement looked nearly alike
_CHANNELS, _SIDE = 256, 64  # of a convolution in the middle of the UNets


def query(torch: Any) -> dict[str, Any]:
    """What this torch is and what it can compute on, as plain JSON types."""
    built = torch.version.cuda
    available = bool(built) and torch.cuda.is_available()
    count = torch.cuda.device_count() if available else 0
    return {
        "torch": torch.__version__,
        "cuda": built,
        "available": available,
        "devices": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
                "uuid": str(getattr(torch.cuda.get_device_properties(index), "uuid", "")),
            }
            for index in range(count)
        ],
        "architectures": torch.cuda.get_arch_list() if built else [],
        "mps": bool(torch.backends.mps.is_available()),
        "refusal": _refusal(torch) if built and not available else None,
    }


def _refusal(torch: Any) -> str | None:
    """Why a torch with CUDA finds no card, in its own words: the first line."""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return next(iter(str(error).splitlines()), None)
    return None


def rate(torch: Any, device: str, dtype: str, cpus: float | None = None) -> float:
    """FLOPs a second of a 3x3 convolution as the UNets have it, doubled in size until it can be timed.

    The first call is a warm-up outside of what counts: cuDNN loads its libraries there. Of each size the least of
    several calls counts. The first size takes a fraction of a millisecond where the dtype has kernels; where it has
    none (fp16 on most CPUs) even that takes long enough, and the rate is known without hanging.

    On a CPU one thread computes, its own CPU time counts, and the rate is multiplied by the threads of the case. Wall
    time would be wrong by 50 to 1,000 times beside other processes: the threads of a convolution wait for each other
    (measured on 2 shared cores: calls of 0.8 ms took 64 to 147 ms, and 31 ms of CPU time, spent on spinning).

    Args:
        torch: the library, set to the precision that fp32 has in this dtype.
        device: as a case names it.
        dtype: of the convolution.
        cpus: how many CPUs the control group grants, if it does: more threads compute no faster.

    Raises:
        RuntimeError: the device cannot compute in this dtype.
    """
    if device != "cpu":
        return _rate(torch, device, dtype, partial(_timed, torch, device))
    threads = int(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        return min(threads, cpus or threads) * _rate(torch, device, dtype, _worked)
    finally:
        torch.set_num_threads(threads)


def _rate(torch: Any, device: str, dtype: str, timed: Callable[[Callable[[], object]], float]) -> float:
    """The best rate over the sizes, by a clock."""
    kind = getattr(torch, DTYPES[dtype])
    channels, side, best = 64, 8, 0.0
    weight = torch.full((channels, channels, 3, 3), 0.01, device=device, dtype=kind)
    began: float | None = None
    with torch.inference_mode():
        while True:
            image = torch.full((1, channels, side, side), 0.5, device=device, dtype=kind)
            call = partial(torch.nn.functional.conv2d, image, weight, padding=1)
            if began is None:
                timed(call)
                began = time.perf_counter()
            seconds = min(timed(call) for _ in range(_CALLS))
            best = max(best, 2.0 * channels * channels * 9 * side * side / seconds)
            if seconds > _ENOUGH_SECONDS or side >= 512 or time.perf_counter() - began > _PATIENCE_SECONDS:
                return best
            side *= 2


def precisions(torch: Any, query: PrecisionQuery, emit: Emit) -> None:
    """Emit the device's capabilities, then for each dtype the kernels that torch reports, and its rate.

    A kernel may end this process: the events before that stand.
    """
    device = query.device
    torch.set_grad_enabled(False)
    if device == "cpu":
        capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
        lanes, threads = _LANES.get(capability, 4), int(torch.get_num_threads())
        emit(CapabilitiesRead(DeviceCapabilities(lanes=lanes, threads=threads)))
    if device.startswith("cuda"):
        tf32 = int(torch.cuda.get_device_capability(device) >= _AMPERE)
        emit(CapabilitiesRead(DeviceCapabilities(tf32=tf32)))
    for dtype in query.dtypes:
        emit(PhaseEntered(dtype))
        probe = PrecisionProbe(dtype, has_kernels(torch, device, dtype))
        emit(PrecisionProbed(probe))
        components.set_precision(torch, dtype)
        try:
            probe = replace(probe, rate=rate(torch, device, dtype, query.cpus))
        except (RuntimeError, TypeError) as error:
            fault = str(error).splitlines()[0][:200]
            probe = replace(probe, fault=fault, unsupported=is_unsupported(error))
        emit(PrecisionProbed(probe))


def has_kernels(torch: Any, device: str, dtype: str) -> bool | None:
    """Return whether torch reports kernels of a dtype for a device; None where torch does not report it."""
    if dtype in {"fp32", "fp64"}:
        return True
    if device.startswith("cuda"):
        capability = torch.cuda.get_device_capability(device)
        # 6.0 has fp16 at twice the rate of fp32, 6.1 at a sixty-fourth (CUDA C++ Programming Guide, throughput).
        return capability >= _AMPERE or (dtype == "fp16" and (capability == (6, 0) or capability >= (7, 0)))
    if device == "mps":
        return dtype == "fp16" or None
    machine = platform.machine().lower()
    if machine not in {"x86_64", "amd64"} and (machine, dtype) not in {("aarch64", "bf16"), ("arm64", "bf16")}:
        return None  # fp16 on ARM has kernels of torch's own, of which the question below says nothing
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return bool(ask()) if ask is not None else None


class Peak:
    """The best rate that a matrix product and a convolution ever reached on a device, in FLOPs a second; and copies.

    A machine's speed drifts with its neighbours, so it is asked before, between and after the images, and the best is
    kept: a share of anything less could be above one.
    """

    def __init__(self, torch: Any, device: str, dtype: str, rate: float) -> None:
        """Choose sizes that take a fiftieth of a second at `rate`: they fill a card, and are small where it is slow."""
        kind = getattr(torch, DTYPES[dtype])
        self._torch, self._device = torch, device
        edge = int((rate * _PROBE_SECONDS / 2) ** (1 / 3))
        self._edge = min(8192, max(64, edge // 64 * 64))
        flops = 2.0 * _CHANNELS * _CHANNELS * 9
        pixels = max(64, int(rate * _PROBE_SECONDS / flops))
        side = min(_SIDE, int(pixels**0.5) // 8 * 8)
        self._convolution = (min(64, max(1, pixels // side**2)), side)
        self._kind = kind
        self.best: dict[str, float] = {}
        self.copies: list[float] = []
        self.seconds = 0.0

    def ask(self) -> None:
        """Ask each, a few times."""
        began = time.perf_counter()
        torch, kind, edge, (batch, side) = self._torch, self._kind, self._edge, self._convolution
        with torch.inference_mode():
            left = torch.full((edge, edge), 0.5, device=self._device, dtype=kind)
            self._keep("matrix product", 2.0 * edge**3, partial(torch.mm, left, left))
            for layout in (torch.contiguous_format, torch.channels_last):
                shape = (batch, _CHANNELS, side, side)
                image = torch.full(shape, 0.5, device=self._device, dtype=kind).to(memory_format=layout)
                weight = torch.full((_CHANNELS, _CHANNELS, 3, 3), 0.01, device=self._device, dtype=kind)
                weight = weight.to(memory_format=layout)
                flops = 2.0 * _CHANNELS * _CHANNELS * 9 * side * side * batch
                self._keep("convolution", flops, partial(torch.nn.functional.conv2d, image, weight, padding=1))
            self._copy()
        self.seconds += time.perf_counter() - began

    def _copy(self) -> None:
        """What a copy in memory moves; nothing where there is no room for it."""
        torch = self._torch
        try:
            source = torch.zeros(_COPY_BYTES, device=self._device, dtype=torch.uint8)
            target = torch.zeros_like(source)
        except (MemoryError, RuntimeError):  # torch.OutOfMemoryError is the latter
            return
        call = partial(target.copy_, source)
        seconds = min(_timed(torch, self._device, call) for _ in range(_MOST_ASKS))
        self.copies.append(2 * _COPY_BYTES / seconds)

    def _keep(self, name: str, flops: float, call: Callable[[], object]) -> None:
        ends = time.perf_counter() + _ASK_SECONDS
        for number in range(_MOST_ASKS):
            seconds = _timed(self._torch, self._device, call)
            if number:  # the first call makes the kernel ready
                self.best[name] = max(self.best.get(name, 0.0), flops / seconds)
            if number and time.perf_counter() > ends:
                return


def _timed(torch: Any, device: str, call: Callable[[], object]) -> float:
    clocks.synchronize(torch, device)
    began = time.perf_counter()
    call()
    clocks.synchronize(torch, device)
    return time.perf_counter() - began


def _worked(call: Callable[[], object]) -> float:
    """Seconds of CPU time that this thread spends on a call; of wall time where the clock is too coarse."""
    is_fine = time.get_clock_info("thread_time").resolution <= _FINE_SECONDS
    clock = time.thread_time if is_fine else time.perf_counter
    began = clock()
    call()
    return max(clock() - began, 1e-9)
