"""Probe a device briefly: what torch can use, the rate of a dtype, and the peak rate between the images."""

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
from bench.worker import components, device_timers

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.worker_events import Emit
    from bench.core.worker_requests import PrecisionQuery

_AMPERE = (8, 0)
_CALLS = 4
_ENOUGH_SECONDS = 0.02
_LIMIT_SECONDS = 1.0
_LANES = {"AVX512": 16, "AVX2": 8, "SVE256": 8}  # {instruction set: fp32 numbers in one vector instruction}
_FINE_SECONDS = 1e-4  # a clock with coarser ticks cannot time a call (Windows counts CPU time in 1/64 s)
_PROBE_SECONDS = 0.02
_PEAK_SECONDS = 0.05
_MAX_CALLS = 5
_COPY_BYTES = 256 << 20  # larger than any cache: with 64 MB, copies in and out of a cache had nearly the same rate
_CHANNELS, _SIDE = 256, 64  # the size of a convolution in the middle of a UNet


def query(torch: Any) -> dict[str, Any]:
    """Return facts about this torch and its devices as a dict with the types of JSON.

    "torch": its version. "cuda": the CUDA version that it is built for, or None. "available": CUDA works. "devices":
    [{"name", "capability", "uuid"}] of the GPUs. "architectures": those that it has machine code for, such as "sm_90".
    "mps": MPS works. "refusal": the first line of the error with which CUDA does not start, or None.
    """
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
    """Return the first line of the error with which CUDA does not start; None if it starts."""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return next(iter(str(error).splitlines()), None)
    return None


def rate(torch: Any, device: str, dtype: str, cpus: float | None = None) -> float:
    """Return the FLOPs a second of a 3x3 convolution like those of a UNet.

    The size of the convolution is doubled until it takes long enough to be timed, and the best rate counts. The first
    call is a warm-up that does not count, since cuDNN loads its libraries there. Of each size the fastest of several
    calls counts. The smallest size takes a fraction of a millisecond on a device that has kernels for the dtype. On
    others (fp16 on most CPUs) even that size takes long enough to give the rate.

    On a CPU one thread computes, its CPU time counts, and the rate is multiplied by the number of the case's threads.
    Beside other processes wall time would be 50 to 1,000 times too long, for the threads of a convolution wait for each
    other. (Measured on 2 shared cores: calls of 0.8 ms took 64 to 147 ms, with 31 ms of CPU time spent on spinning.)

    Args:
        torch: the library, after `components.set_precision` for this dtype.
        device: the device name of a case.
        dtype: the dtype of the convolution.
        cpus: the CPU quota of the control group, in cores; None without a quota. More threads than this compute no
            faster.

    Raises:
        RuntimeError: the device cannot compute in this dtype.
    """
    if device != "cpu":
        return _rate(torch, device, dtype, partial(_wall_seconds, torch, device))
    threads = int(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        return min(threads, cpus or threads) * _rate(torch, device, dtype, _cpu_seconds)
    finally:
        torch.set_num_threads(threads)


def _rate(torch: Any, device: str, dtype: str, timed: Callable[[Callable[[], object]], float]) -> float:
    """Return the best FLOPs a second over the sizes; `timed` returns the seconds of a call."""
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
            if seconds > _ENOUGH_SECONDS or side >= 512 or time.perf_counter() - began > _LIMIT_SECONDS:
                return best
            side *= 2


def precisions(torch: Any, query: PrecisionQuery, emit: Emit) -> None:
    """Emit the capabilities of the device; then, for each dtype, whether torch reports kernels, and the measured rate.

    Each result is emitted before the next probe begins, since a kernel may crash this process.
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
    """Return whether torch reports kernels of a dtype for a device; None if torch does not report that."""
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
        return None  # torch computes fp16 on ARM with its own kernels, which oneDNN does not report
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return bool(is_supported()) if is_supported is not None else None


class Peak:
    """Measure the best FLOPs a second of a matrix product and of a convolution on a device, and the rate of copies.

    The speed of a machine changes with other work. So this is measured before, between and after the images, and the
    best rate is kept. With a lower one, the rate of a case could be more than 100 % of it.
    """

    def __init__(self, torch: Any, device: str, dtype: str, rate: float) -> None:
        """Choose sizes that take about 0.02 s at `rate` FLOPs a second: large on a GPU, small on a slow device."""
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

    def measure(self) -> None:
        """Measure the matrix product, the convolution and the copies a few times each, and keep the best rates."""
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
        """Measure the rate of a copy within the memory of the device; do nothing if there is too little free memory."""
        torch = self._torch
        try:
            source = torch.zeros(_COPY_BYTES, device=self._device, dtype=torch.uint8)
            target = torch.zeros_like(source)
        except (MemoryError, RuntimeError):  # torch.OutOfMemoryError is a RuntimeError
            return
        call = partial(target.copy_, source)
        seconds = min(_wall_seconds(torch, self._device, call) for _ in range(_MAX_CALLS))
        self.copies.append(2 * _COPY_BYTES / seconds)

    def _keep(self, name: str, flops: float, call: Callable[[], object]) -> None:
        ends = time.perf_counter() + _PEAK_SECONDS
        for number in range(_MAX_CALLS):
            seconds = _wall_seconds(self._torch, self._device, call)
            if number:  # the first call is a warm-up
                self.best[name] = max(self.best.get(name, 0.0), flops / seconds)
            if number and time.perf_counter() > ends:
                return


def _wall_seconds(torch: Any, device: str, call: Callable[[], object]) -> float:
    device_timers.synchronize(torch, device)
    began = time.perf_counter()
    call()
    device_timers.synchronize(torch, device)
    return time.perf_counter() - began


def _cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds that this thread spends on a call; wall seconds where the CPU clock is too coarse."""
    is_fine = time.get_clock_info("thread_time").resolution <= _FINE_SECONDS
    clock = time.thread_time if is_fine else time.perf_counter
    began = clock()
    call()
    return max(clock() - began, 1e-9)
