"""What the probes need of a device, for a CPU and a CUDA card; how a question to it is timed and guarded."""

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

# name -> torch's. A tf32 product takes and gives fp32, an fp8 one gives bf16.
KINDS = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
NO_TIME = "no time is left in its share of the budget"
_GROUP_SECONDS = 0.02  # a thousand times what a clock or an event is wrong by
_TRIES = 3
_MOST_SAMPLES = 60
_GROWTH = 1.05  # what a larger shape has to gain for a still larger one to be missed
_CAUTION = 2.0  # a call may take so much longer than one of half its size foretells
_ROOM = 4  # of the free memory a question takes a quarter at most
# What torch's messages say where a device is well: there is no room, the card is another process's alone, or a library
# is not the one that torch was built with.
_NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "cannot allocate")
_NOT_ITS_OWN = ("busy or unavailable", "version incompatib", "no kernel image", "NOT_INITIALIZED")


class Device(Protocol):
    """A device that is asked. `dtypes`: what its matrix products can be asked in, by the names of readings."""

    torch: Any
    name: str
    dtypes: tuple[str, ...]
    is_card: bool

    def wait(self) -> None:
        """Wait until it has done all that it was told."""

    def timed(self, call: Callable[[], object], times: int = 1) -> float:
        """The seconds that one of so many calls takes; none is waited for but the last."""

    def free_bytes(self) -> int | None:
        """What could still be allocated on it; None where nothing tells."""

    def let_go(self) -> None:
        """Give back what the allocator holds and nobody uses."""

    def product(self, dtype: str, left: Any, right: Any) -> Any:
        """A matrix product, of what `operands` has made."""


class Cpu:
    """The host's own processor."""

    is_card = False
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")

    def __init__(self, torch: Any, name: str = "cpu") -> None:
        """Take torch."""
        self.torch, self.name = torch, name

    def wait(self) -> None:
        """Nothing: it works in step with the host."""

    def timed(self, call: Callable[[], object], times: int = 1) -> float:
        """By the host's clock."""
        began = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - began) / times

    def free_bytes(self) -> int | None:
        """The machine's, or the control group's where that is less."""
        return memory.free_bytes()

    def let_go(self) -> None:
        """Nothing: its allocator holds nothing back."""

    def product(self, dtype: str, left: Any, right: Any) -> Any:
        """A matrix product, of what `operands` has made."""
        return _product(self.torch, dtype, left, right)


class Cuda:
    """A CUDA card: its own events tell the time."""

    is_card = True

    def __init__(self, torch: Any, name: str) -> None:
        """Take torch and the device's name; it becomes the current one."""
        self.torch, self.name = torch, name
        torch.cuda.set_device(name)
        capability = torch.cuda.get_device_capability(name)
        # Tensor cores: fp16 from 7.0, bf16 and TF32 from 8.0, fp8 from 8.9 (source: NVIDIA's CUDA programming guide,
        # compute capabilities; torch asks for 8.9 in _scaled_mm).
        ampere, ada = capability >= (8, 0), capability >= (8, 9)
        self.dtypes: tuple[str, ...] = (
            "fp32",
            *(("tf32", "bf16") if ampere else ()),
            "fp16",
            *(("fp8",) if ada else ()),
        )

    def wait(self) -> None:
        """Wait until it has done all that it was told."""
        self.torch.cuda.synchronize(self.name)

    def timed(self, call: Callable[[], object], times: int = 1) -> float:
        """By two events on its stream (they tell milliseconds)."""
        first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        first.record()
        for _ in range(times):
            call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000.0 / times

    def free_bytes(self) -> int | None:
        """As its driver tells: what other processes hold is not free."""
        return int(self.torch.cuda.mem_get_info(self.name)[0])

    def let_go(self) -> None:
        """Give back what the allocator holds and nobody uses; what a broken card says to that was said before."""
        with contextlib.suppress(RuntimeError):
            self.torch.cuda.empty_cache()

    def product(self, dtype: str, left: Any, right: Any) -> Any:
        """A matrix product, of what `operands` has made."""
        return _product(self.torch, dtype, left, right)


def of(torch: Any, name: str) -> Device:
    """The device of a name ("cpu", "cuda:0"), ready to be asked."""
    return Cuda(torch, name) if name.startswith("cuda") else Cpu(torch, name)


def operands(device: Device, dtype: str, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Two matrices of normal numbers, m by k and k by n: what is computed with zeros takes less power than work does.

    Args:
        device: where they lie.
        dtype: a name of KINDS.
        shape: (m, n, k).
    """
    torch = device.torch
    m, n, k = shape
    generator = torch.Generator(device.name).manual_seed(0)
    # In fp8 the right one lies column by column, as its kernels want it.
    sizes = ((m, k), (n, k) if dtype == "fp8" else (k, n))
    made = [torch.empty(size, device=device.name).normal_(generator=generator) for size in sizes]
    left, right = (each.to(getattr(torch, KINDS[dtype])) for each in made)
    return left, right.t() if dtype == "fp8" else right


def _product(torch: Any, dtype: str, left: Any, right: Any) -> Any:
    if dtype != "fp8":
        return torch.mm(left, right)
    one = torch.ones((), device=left.device)
    told = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    # The way whose figure is on the sheets: sums stay in the tensor cores, and keep fewer bits there.
    return torch._scaled_mm(left, right, **told, use_fast_accum=True)  # noqa: SLF001 (torch has no other name for it)


@dataclass(frozen=True)
class Variant:
    """One of several ways to ask the same.

    `amount`: FLOPs or bytes of a call. `figures`: what tells it from the others. `room_bytes` that it takes. `make`
    allocates what it needs, and gives the call.
    """

    amount: float
    figures: dict[str, float]
    room_bytes: int
    make: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class FastestVariant:
    """The way that was fastest: its rate a second, as often as there was time for."""

    rates: tuple[float, ...]
    figures: dict[str, float]


def fastest(device: Device, ways: Sequence[Variant], until: float) -> FastestVariant:
    """Try ways, without those that the best one says there is no time for; then the best again.

    Where ways of more work than the best one's were left out, and the rate was still growing, the figure CUT says so.

    Args:
        device: is asked.
        ways: a small amount first.
        until: the time (time.perf_counter) after which nothing is begun.

    Raises:
        SkipError: there is not even time, or memory, for the first.
    """
    best, again, rate, most, free = FastestVariant((), {}), None, 0.0, 0.0, device.free_bytes()
    tried: list[tuple[float, float]] = []  # (amount, rate)
    for way in ways:
        left = until - time.perf_counter()
        price = way.amount / rate * _CAUTION if rate else 0.0
        is_room = free is None or way.room_bytes * _ROOM <= free
        if left <= 0 or price * (_TRIES + 1) > left or not is_room:
            most = max(most, way.amount)
            continue
        call = way.make()
        device.timed(call)  # the first call makes the kernel ready
        times = grouped(device, call, _GROUP_SECONDS)
        rates = tuple(way.amount / device.timed(call, times) for _ in range(_TRIES))
        rate = max(rates)
        tried.append((way.amount, rate))
        if rate > max(best.rates, default=0.0):
            best, again = FastestVariant(rates, way.figures), (way, call, times)
    if again is None:
        raise SkipError(NO_TIME if until <= time.perf_counter() else "there is no room for it")
    way, call, times = again
    smaller = max((found for amount, found in tried if amount < way.amount), default=0.0)
    if most > way.amount and max(best.rates) > _GROWTH * smaller:
        best = replace(best, figures=best.figures | {CUT: 1.0})
    rates = best.rates
    while len(rates) < _MOST_SAMPLES and time.perf_counter() + way.amount / max(rates) * times < until:
        rates += (way.amount / device.timed(call, times),)
    return replace(best, rates=rates)


def grouped(device: Device, call: Callable[[], object], seconds: float) -> int:
    """How many calls take about so long together. It is tried: one call's time may be far from the next one's."""
    times = 1
    while device.timed(call, times) * times < seconds / 1.5:
        times *= 2
    return times


def asked(blank: Reading, ask: Callable[[], Reading]) -> Reading:
    """What a question has found; where it was stopped, the blank reading with what stopped it."""
    try:
        return ask()
    except Exception as error:  # the other questions go on
        return stopped(blank, error)


def stopped(blank: Reading, error: Exception) -> Reading:
    """A blank reading with what stopped it.

    An error that torch raises while it computes (a CUDA error above all) speaks against the device. Where there is no
    room, no time, no such kernel, or some library fails, that is why there is no figure.
    """
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    if isinstance(error, (SkipError, MemoryError)):
        return replace(blank, why_not=said)
    if not isinstance(error, RuntimeError):
        return replace(blank, why_not=f"{type(error).__name__}: {said}")
    if is_unsupported(error):
        return replace(blank, why_not=said, figures={UNABLE: 1.0})
    text = str(error).lower()
    known = any(each.lower() in text for each in (*_NO_ROOM, *_NOT_ITS_OWN))
    is_well = known or type(error).__name__ == "OutOfMemoryError"
    return replace(blank, why_not=said) if is_well else replace(blank, fault=said)


def timed_best(blank: Reading, device: Device, ways: Sequence[Variant], until: float) -> Reading:
    """A blank reading with the rate of the fastest way, or with what stopped it."""

    def ask() -> Reading:
        found = fastest(device, ways, until)
        return replace(blank, value=max(found.rates), samples=found.rates, figures=found.figures)

    try:
        return asked(blank, ask)
    finally:
        device.let_go()
