"""Give the checks access to a CPU or a CUDA device; time their calls and turn errors into readings."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from bench.core.errors import SkipError, is_unsupported
from bench.core.validation_records import CUT, UNABLE
from bench.worker import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.core.validation_records import Reading

# {name: torch's dtype}. A tf32 product has fp32 inputs and results; an fp8 product has bf16 results.
KINDS = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
NO_TIME = "no time is left in its share of the budget"
_GROUP_SECONDS = 0.02  # calls are timed in groups of this length: a thousand times the error of a clock or an event
_TRIES = 3
_MOST_SAMPLES = 60
_GROWTH = (
    1.05  # the rate is still growing with the work if the fastest variant is faster by this factor than smaller ones
)
_CAUTION = 2.0  # a call may take this many times as long as a smaller call predicts
_ROOM = 4  # a variant takes at most a quarter of the free memory
# Phrases in torch's messages that show no fault of the device: there is too little memory (first line), another process
# has exclusive use of the card, or a library is not the one that torch was built with.
_NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "cannot allocate")
_NOT_ITS_OWN = ("busy or unavailable", "version incompatib", "no kernel image", "NOT_INITIALIZED")


class Device(Protocol):
    """Give the checks access to one device.

    `dtypes`: the dtypes whose matrix products are measured, by the names of KINDS. `is_card`: it is a CUDA device.
    """

    torch: Any
    name: str
    dtypes: tuple[str, ...]
    is_card: bool

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""

    def timed(self, call: Callable[[], object], times: int = 1) -> float:
        """Return the mean seconds of `times` calls; the device is waited for only after the last one."""

    def free_bytes(self) -> int | None:
        """Return the bytes that can still be allocated on the device; None if that is unknown."""

    def empty_cache(self) -> None:
        """Free the memory that torch's allocator caches."""

    def product(self, dtype: str, left: Any, right: Any) -> Any:
        """Return the matrix product of two matrices that `operands` has made."""


class Cpu:
    """Give the checks access to the host's CPU."""

    is_card = False
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")

    def __init__(self, torch: Any, name: str = "cpu") -> None:
        """Store torch and the name of the device."""
        self.torch, self.name = torch, name

    def wait(self) -> None:
        """Do nothing: the CPU computes synchronously."""

    def timed(self, call: Callable[[], object], times: int = 1) -> float:
        """Return the mean seconds of the calls, measured by the host's clock."""
        began = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - began) / times

    def free_bytes(self) -> int | None:
        """Return the free bytes of the machine, or of the control group if it has less."""
        return memory.free_bytes()

    def empty_cache(self) -> None:
        """Do nothing: torch's CPU allocator caches no memory."""

    def product(self, dtype: str, left: Any, right: Any) -> Any:
        """Return the matrix product of two matrices that `operands` has made."""
        return _product(self.torch, dtype, left, right)


class Cuda:
    """Give the checks access to a CUDA device, whose events measure the time."""

    is_card = True

    def __init__(self, torch: Any, name: str) -> None:
        """Store torch and the device's name, and make it the current device."""
        self.torch, self.name = torch, name
        torch.cuda.set_device(name)
        capability = torch.cuda.get_device_capability(name)
        # Tensor cores: fp16 from 7.0, bf16 and TF32 from 8.0, fp8 from 8.9 (source: NVIDIA's CUDA programming guide,
        # compute capabilities; torch requires 8.9 in _scaled_mm).
        ampere, ada = capability >= (8, 0), capability >= (8, 9)
        self.dtypes: tuple[str, ...] = (
            "fp32",
            *(("tf32", "bf16") if ampere else ()),
            "fp16",
            *(("fp8",) if ada else ()),
        )

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""
        self.torch.cuda.synchronize(self.name)

    def timed(self, call: Callable[[], object], times: int = 1) -> float:
        """Return the mean seconds of the calls, measured by two events on the stream."""
        first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        first.record()
        for _ in range(times):
            call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000.0 / times

    def free_bytes(self) -> int | None:
        """Return the free bytes of the GPU as the driver reports them; memory of other processes is not free."""
        return int(self.torch.cuda.mem_get_info(self.name)[0])

    def empty_cache(self) -> None:
        """Free the memory that torch's allocator caches.

        Ignore errors of a broken device, which a reading has reported.
        """
        with contextlib.suppress(RuntimeError):
            self.torch.cuda.empty_cache()

    def product(self, dtype: str, left: Any, right: Any) -> Any:
        """Return the matrix product of two matrices that `operands` has made."""
        return _product(self.torch, dtype, left, right)


def access(torch: Any, name: str) -> Device:
    """Return access to the device of this name ("cpu", "cuda:0")."""
    return Cuda(torch, name) if name.startswith("cuda") else Cpu(torch, name)


def operands(device: Device, dtype: str, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Return two matrices of normally distributed numbers, m by k and k by n.

    They are not zeros, since a GPU takes less power for zeros than for real work.

    Args:
        device: the device that holds them.
        dtype: a name of KINDS.
        shape: (m, n, k).
    """
    torch = device.torch
    m, n, k = shape
    generator = torch.Generator(device.name).manual_seed(0)
    # The kernels for fp8 need the right matrix in column-major order.
    sizes = ((m, k), (n, k) if dtype == "fp8" else (k, n))
    tensors = [torch.empty(size, device=device.name).normal_(generator=generator) for size in sizes]
    left, right = (tensor.to(getattr(torch, KINDS[dtype])) for tensor in tensors)
    return left, right.t() if dtype == "fp8" else right


def _product(torch: Any, dtype: str, left: Any, right: Any) -> Any:
    if dtype != "fp8":
        return torch.mm(left, right)
    one = torch.ones((), device=left.device)
    options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    # The rates of data sheets are with fast accumulation: sums stay in the tensor cores, with fewer bits.
    return torch._scaled_mm(left, right, **options, use_fast_accum=True)  # noqa: SLF001 (torch has no other name for it)


@dataclass(frozen=True)
class Variant:
    """Describe one way to measure a rate, such as one shape of a matrix product.

    `amount`: the FLOPs or bytes of a call. `figures`: its parameters, for the reading. `room_bytes`: the memory that it
    needs. `make`: allocates that memory and returns the call to time.
    """

    amount: float
    figures: dict[str, float]
    room_bytes: int
    make: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class FastestVariant:
    """Record the fastest variant: its rates (FLOPs or bytes a second), one per sample, and its figures."""

    rates: tuple[float, ...]
    figures: dict[str, float]


def fastest(device: Device, variants: Sequence[Variant], until: float) -> FastestVariant:
    """Measure all variants for which time and memory suffice, then the fastest one again.

    The result has the figure CUT, a lower bound, if a variant with more work than the fastest one was left out although
    the rate was still growing with the work.

    Args:
        device: the device.
        variants: the variants, beginning with one that takes little time.
        until: the time (time.perf_counter) after which nothing is begun.

    Raises:
        SkipError: time or memory do not suffice for any variant.
    """
    best, chosen, rate, largest_skipped, free = FastestVariant((), {}), None, 0.0, 0.0, device.free_bytes()
    measured: list[tuple[float, float]] = []  # (amount, rate) of each variant that was measured
    for variant in variants:
        left = until - time.perf_counter()
        predicted_seconds = variant.amount / rate * _CAUTION if rate else 0.0
        is_room = free is None or variant.room_bytes * _ROOM <= free
        if left <= 0 or predicted_seconds * (_TRIES + 1) > left or not is_room:
            largest_skipped = max(largest_skipped, variant.amount)
            continue
        call = variant.make()
        device.timed(call)  # the first call is a warm-up
        times = calls_for(device, call, _GROUP_SECONDS)
        rates = tuple(variant.amount / device.timed(call, times) for _ in range(_TRIES))
        rate = max(rates)
        measured.append((variant.amount, rate))
        if rate > max(best.rates, default=0.0):
            best, chosen = FastestVariant(rates, variant.figures), (variant, call, times)
    if chosen is None:
        raise SkipError(NO_TIME if until <= time.perf_counter() else "there is not enough free memory")
    variant, call, times = chosen
    smaller = max((rate_ for amount, rate_ in measured if amount < variant.amount), default=0.0)
    if largest_skipped > variant.amount and max(best.rates) > _GROWTH * smaller:
        best = replace(best, figures=best.figures | {CUT: 1.0})
    rates = best.rates
    while len(rates) < _MOST_SAMPLES and time.perf_counter() + variant.amount / max(rates) * times < until:
        rates += (variant.amount / device.timed(call, times),)
    return replace(best, rates=rates)


def calls_for(device: Device, call: Callable[[], object], seconds: float) -> int:
    """Return a number of calls that together take about this many seconds, found by trying 1, 2, 4, ... calls."""
    times = 1
    while device.timed(call, times) * times < seconds / 1.5:
        times *= 2
    return times


def reading_or_error(blank: Reading, check: Callable[[], Reading]) -> Reading:
    """Return the reading of a check, or the blank reading with the error that ended the check."""
    try:
        return check()
    except Exception as error:  # an error ends one check, and not the others
        return with_error(blank, error)


def with_error(blank: Reading, error: Exception) -> Reading:
    """Return a blank reading with the error that ended its check.

    An error that torch raises while it computes (above all a CUDA error) is a fault of the device. Too little memory or
    time, a missing kernel or a failing library is the reason for a missing value, and no fault.
    """
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    if isinstance(error, (SkipError, MemoryError)):
        return replace(blank, why_not=message)
    if not isinstance(error, RuntimeError):
        return replace(blank, why_not=f"{type(error).__name__}: {message}")
    if is_unsupported(error):
        return replace(blank, why_not=message, figures={UNABLE: 1.0})
    text = str(error).lower()
    is_known = any(phrase.lower() in text for phrase in (*_NO_ROOM, *_NOT_ITS_OWN))
    is_well = is_known or type(error).__name__ == "OutOfMemoryError"
    return replace(blank, why_not=message) if is_well else replace(blank, fault=message)


def timed_best(blank: Reading, device: Device, variants: Sequence[Variant], until: float) -> Reading:
    """Return a reading with the rate of the fastest variant, or with the error that ended its measurement."""

    def check() -> Reading:
        result = fastest(device, variants, until)
        return replace(blank, value=max(result.rates), samples=result.rates, figures=result.figures)

    try:
        return reading_or_error(blank, check)
    finally:
        device.empty_cache()
