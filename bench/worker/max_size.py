"""Search the largest batch and the largest square image that fit in memory."""

from __future__ import annotations

import copy
import gc
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.core.errors import SkipError
from bench.core.result import Fit
from bench.worker import device_timers, memory, sampling

if TYPE_CHECKING:
    from bench.worker.components import Model

_GRID = 64  # pixels; every UNet of the architectures accepts multiples of it
_MAX_BATCH, _MAX_SIZE = 4096, 16384
_CAUTION = 1.05
_MEMORY, _TIME, _LIMIT = "memory", "time", "search"


@dataclass
class _Search:
    """Record the largest value that fitted in memory (`fits`.

    None if none did), and what ended the search (`bound`).
    """

    fits: int | None
    bound: str


def largest(model: Model, until: float) -> Fit:
    """Search the largest batch at the case's image size, then the largest square image at batch 1.

    Each try runs one evaluation and a decode. The value doubles until it does not fit; then the gap between the largest
    that fits and the smallest that does not is halved. On a GPU a value that does not fit raises an error and does no
    harm. On a CPU the kernel would kill the process, and torch's kernels no longer work after a failed allocation. So
    on a CPU the memory peak of each try predicts that of the next, and a value that would not fit is not tried.

    Args:
        model: the model of the case, with its weights.
        until: the time (time.perf_counter) after which nothing is tried.
    """
    if model.case.compile != "eager":
        return Fit(None, "the model is compiled for one size", None, "the model is compiled for one size")
    half = time.perf_counter() + (until - time.perf_counter()) / 2
    batch = _search(_Tries(model, "batch", 1), half, _MAX_BATCH)
    size = _search(_Tries(model, "size", _GRID), until, _MAX_SIZE // _GRID)
    return Fit(batch.fits, batch.bound, size.fits and size.fits * _GRID, size.bound)


class _Tries:
    """Try values of one quantity, "batch" or "size"; a value counts in `unit`.

    `power`: time and memory are assumed to grow with this power of the value.
    """

    def __init__(self, model: Model, quantity: str, unit: int) -> None:
        self._model, self._quantity, self._unit = model, quantity, unit
        self.power = 1 if quantity == "batch" else 2
        self._taken: list[tuple[int, int]] = []
        self._free = None if model.case.device.startswith("cuda") else memory.free_bytes()

    def __call__(self, value: int) -> float | None:
        """Return the seconds of an image with this batch or size; None if it does not fit in memory."""
        if self._free is not None and self._predicted(value) > self._free:
            return None
        before = memory.rss_bytes()
        memory.reset_host_peak()
        began = time.perf_counter()
        if not _fits(self._model, **{self._quantity: value * self._unit}):
            return None
        seconds, peak = time.perf_counter() - began, memory.host_peak_bytes()
        if peak is not None and before is not None:
            self._taken.append((value, peak - before))
            if self._free is not None and peak - before > self._free:
                return None
        return seconds

    def _predicted(self, value: int) -> float:
        """Return the predicted bytes of a value, from the last try and the growth between the last two.

        0.0 without a try.
        """
        if not self._taken:
            return 0.0
        power: float = self.power
        last, last_bytes = self._taken[-1]
        if len(self._taken) > 1:
            earlier, earlier_bytes = self._taken[-2]
            if last_bytes > earlier_bytes > 0 and last != earlier:
                power = min(4.0, max(self.power, math.log(last_bytes / earlier_bytes) / math.log(last / earlier)))
        growth: float = (value / last) ** power
        return last_bytes * growth * _CAUTION


def _search(fits: _Tries, until: float, most: int) -> _Search:
    """Search the largest value that fits: double it from one, then halve the gap.

    Args:
        fits: tries a value; returns its seconds, or None.
        until: the time (time.perf_counter) by which every try has to end.
        most: the largest value to try.
    """
    largest_fit, seconds, smallest_misfit, value = None, 0.0, None, 1
    while True:
        # Time grows with the 2nd power of the edge (convolutions) to the 4th (attention).
        growth = (value / largest_fit) ** (2 * fits.power - 1) if largest_fit is not None else 1.0
        if largest_fit is not None and time.perf_counter() + seconds * growth > until:
            return _Search(largest_fit, _TIME)
        took = fits(value)
        if took is None:
            smallest_misfit = value
        else:
            largest_fit, seconds = value, took
        if largest_fit is None:
            return _Search(None, _MEMORY)
        if smallest_misfit is None and largest_fit >= most:
            return _Search(largest_fit, _LIMIT)
        if smallest_misfit is not None and smallest_misfit - largest_fit <= 1:
            return _Search(largest_fit, _MEMORY)
        value = min(largest_fit * 2, most) if smallest_misfit is None else (largest_fit + smallest_misfit) // 2


def _fits(model: Model, *, batch: int | None = None, size: int | None = None) -> bool:
    torch, case = model.torch, model.case
    trial = copy.copy(model)
    trial.case = replace(
        case,
        batch=1 if size else batch or case.batch,
        height=size or case.height,
        width=size or case.width,
        scheduler="ddim",
        steps=2 if model.task == "image-to-image" else 1,
    )
    try:
        sampling.Loop(trial)(lambda: None)
        device_timers.synchronize(torch, case.device)
    except (RuntimeError, MemoryError, ValueError, SkipError):  # a value that fails for any reason counts as too large
        return False
    finally:
        gc.collect()
        if case.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return True
