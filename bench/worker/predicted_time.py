"""Predict the cost of a case from a rate, and check the prediction during the first image."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

from bench.core.errors import BUDGET, SkipError
from bench.worker import device_probe

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.result import Case

_MISSED = 50.0  # a probe that is this many times below fp32's known rate was disturbed


def believed(torch: Any, case: Case, rate: float, fp32: float | None) -> float:
    """Return the rate that prices a case: the probe's, or the known one of fp32 where the probe was disturbed.

    A dtype with kernels is never 50 times slower than fp32, so such a probe was disturbed. The case is then begun, and
    its first image shows the cost. fp64 may be so slow: consumer cards have a sixty-fourth of fp32's rate (CUDA C++
    Programming Guide, throughput). A CPU's probe counts its own CPU time, which other processes cannot change.

    Args:
        torch: the library.
        case: the case.
        rate: the FLOPs a second that the probe measured in the case's dtype.
        fp32: the known FLOPs a second of the device in fp32; None where it is unknown.
    """
    if fp32 is None or case.device == "cpu" or case.dtype == "fp64" or rate * _MISSED > fp32:
        return rate
    return rate if device_probe.has_kernels(torch, case.device, case.dtype) is False else fp32


def check_room(torch: Any, case: Case, weight_bytes: int) -> None:
    """Reject a case whose weights are larger than the GPU's memory.

    Raises:
        SkipError: the weights are larger.
    """
    if not case.device.startswith("cuda") or case.offload != "none":
        return
    room = int(torch.cuda.get_device_properties(case.device).total_memory)
    if weight_bytes > room:
        raise SkipError(f"the weights take {weight_bytes / 1e9:.3g} GB, and the card has {room / 1e9:.3g} GB")


def guard(case: Case, evaluations: int, images: int, limit: float) -> Callable[[], None]:
    """Return a function that checks the cost after each step of the first image; it raises SkipError.

    The fastest of two or more steps gives the least cost of the whole case, since one slow step may be a disturbed one.
    Only a CPU is checked: elsewhere the host's clock is ahead of the device.
    """
    marks: list[float] = []

    def check() -> None:
        marks.append(time.perf_counter())
        steps = len(marks) - 1
        if steps < 2 or case.device != "cpu":
            return
        step = min(after - before for before, after in itertools.pairwise(marks))
        rest = step * (evaluations - steps) + step * evaluations * images
        left = limit - marks[-1]
        if rest > left:
            raise SkipError(over(step, rest, left))

    return check


def over(step: float, whole: float, left: float) -> str:
    """Return the reason for skipping a case that would not end in time."""
    return f"predicted {step:.3g} s a step, {whole:.0f} s for the shortest run; {BUDGET} {max(left, 0):.0f} s"


def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls both functions."""

    def call() -> None:
        first()
        second()

    return call
