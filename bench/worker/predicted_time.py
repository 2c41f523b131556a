"""Predict the time of a case from a measured rate, and check the prediction during the first image."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

from bench.core.errors import BUDGET, SkipError
from bench.worker import device_probe

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.result import Case

_MISSED = 50.0  # a probe that is this many times slower than fp32 was disturbed by other work


def usable_rate(torch: Any, case: Case, rate: float, fp32: float | None) -> float:
    """Return the rate from which the time of a case is predicted: the probe's, or that of fp32 after a disturbed probe.

    A dtype that has kernels is never 50 times slower than fp32, so a probe that is so slow was disturbed by other work.
    The case then begins, and its first image shows how long it takes. fp64 can be so slow: consumer cards have a
    sixty-fourth of fp32's rate (CUDA C++ Programming Guide, throughput). The probe of a CPU counts its own CPU time,
    which other processes do not change.

    Args:
        torch: the library.
        case: the case.
        rate: the FLOPs a second that the probe measured in the case's dtype.
        fp32: the FLOPs a second of the device in fp32, measured before; None if unknown.
    """
    if fp32 is None or case.device == "cpu" or case.dtype == "fp64" or rate * _MISSED > fp32:
        return rate
    return rate if device_probe.has_kernels(torch, case.device, case.dtype) is False else fp32


def check_memory(torch: Any, case: Case, weight_bytes: int) -> None:
    """Reject a case whose weights are larger than the GPU's memory.

    Raises:
        SkipError: the weights are larger.
    """
    if not case.device.startswith("cuda") or case.offload != "none":
        return
    room = int(torch.cuda.get_device_properties(case.device).total_memory)
    if weight_bytes > room:
        raise SkipError(f"the weights take {weight_bytes / 1e9:.3g} GB, and the card has {room / 1e9:.3g} GB")


def time_check(case: Case, evaluations: int, images: int, limit: float) -> Callable[[], None]:
    """Return a function to call at the begin of the first image and after each of its steps; it raises SkipError.

    It raises if the case cannot end before `limit`. The rest of the case is predicted from the fastest step, since
    other work may have disturbed a slow one; two steps are needed. Only a CPU is checked: elsewhere the host does not
    wait for the steps.

    Args:
        case: the case.
        evaluations: the evaluations of the model per image.
        images: the fewest images after the first one that give a result.
        limit: the time (time.perf_counter) by which the case has to end.
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
            raise SkipError(too_long(step, rest, left))

    return check


def too_long(step: float, whole: float, left: float) -> str:
    """Return the reason for skipping a case that would not end in time.

    Args:
        step: the predicted seconds of a step.
        whole: the predicted seconds of the fewest images that give a result.
        left: the seconds that are left.
    """
    return f"predicted {step:.3g} s a step, {whole:.0f} s for the shortest run; {BUDGET} {max(left, 0):.0f} s"


def call_both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls the first function, then the second one."""

    def call() -> None:
        first()
        second()

    return call
