"""The price of a case: which rate it is predicted from, and what the first image says of that."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

from bench.core.errors import BUDGET, SkipError
from bench.worker import device_probe

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.result import Case

_MISSED = 50.0  # times below fp32's known rate: a disturbed probe, as no low precision with kernels is so slow


def believed(torch: Any, case: Case, rate: float, fp32: float | None) -> float:
    """Return the rate that prices a case: the device's in fp32 where the probe's misses that by 50 times.

    A low precision with kernels is not so slow: the probe was disturbed, so begin the case and let the first image
    tell. fp64 may be: consumer cards have a sixty-fourth of fp32's rate (CUDA C++ Programming Guide, throughput). A
    CPU's probe counts its own CPU time, which no other process can take.

    Args:
        torch: the library.
        case: the case.
        rate: FLOPs a second, as the probe found in the case's dtype.
        fp32: what the device is known to reach in fp32; None where that is not known.
    """
    if fp32 is None or case.device == "cpu" or case.dtype == "fp64" or rate * _MISSED > fp32:
        return rate
    return rate if device_probe.has_kernels(torch, case.device, case.dtype) is False else fp32


def check_room(torch: Any, case: Case, weight_bytes: int) -> None:
    """Refuse a case whose weights alone are larger than its card: it cannot run there.

    Raises:
        SkipError: they are.
    """
    if not case.device.startswith("cuda") or case.offload != "none":
        return
    room = int(torch.cuda.get_device_properties(case.device).total_memory)
    if weight_bytes > room:
        raise SkipError(f"its weights take {weight_bytes / 1e9:.3g} GB, and the card has {room / 1e9:.3g} GB")


def guard(case: Case, evaluations: int, images: int, limit: float) -> Callable[[], None]:
    """Watch the first image: the quickest of two or more steps tells what the whole case costs at least.

    One slow step may be a disturbed one. Only on a CPU: elsewhere the host's clock is ahead of the device.
    """
    marks: list[float] = []

    def look() -> None:
        marks.append(time.perf_counter())
        steps = len(marks) - 1
        if steps < 2 or case.device != "cpu":
            return
        step = min(after - before for before, after in itertools.pairwise(marks))
        rest = step * (evaluations - steps) + step * evaluations * images
        left = limit - marks[-1]
        if rest > left:
            raise SkipError(over(step, rest, left))

    return look


def over(step: float, whole: float, left: float) -> str:
    """Return why a case is skipped that would not end in time."""
    return f"predicted {step:.3g} s a step, {whole:.0f} s for the shortest run; {BUDGET} {max(left, 0):.0f} s"


def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """Return a call of both."""

    def call() -> None:
        first()
        second()

    return call
