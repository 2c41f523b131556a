"""The largest batch and the largest image that fit, found by trying."""

from __future__ import annotations

import copy
import gc
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.core.errors import SkipError
from bench.core.result import Fit
from bench.worker import clocks, memory, sampling

if TYPE_CHECKING:
    from bench.worker.components import Model

_GRID = 64  # pixels; the images of a grid that every UNet here takes
_MOST_BATCH, _MOST_SIZE = 4096, 16384
_CAUTION = 1.05
_MEMORY, _TIME, _MOST = "memory", "time", "search"


@dataclass
class _Search:
    """One quantity: the largest that was seen to fit, and what ended the search."""

    fits: int | None
    bound: str


def largest(model: Model, until: float) -> Fit:
    """The largest batch at the case's image, then the largest square image at batch 1, in one evaluation and a decode.

    What is tried doubles until it does not fit, then the gap is halved. On a card what does not fit fails, and that is
    all. On a CPU the process would be killed, and its kernels stay broken after a failure: there each try's own peak
    tells what the next one would take, and one that would not fit is not made.

    Args:
        model: the case's, with its weights.
        until: the time (time.perf_counter) after which nothing is tried.
    """
    if model.case.compile != "eager":
        return Fit(None, "it is compiled for one size", None, "it is compiled for one size")
    half = time.perf_counter() + (until - time.perf_counter()) / 2
    batch = _search(_Tries(model, "batch", 1), half, _MOST_BATCH)
    size = _search(_Tries(model, "size", _GRID), until, _MOST_SIZE // _GRID)
    return Fit(batch.fits, batch.bound, size.fits and size.fits * _GRID, size.bound)


class _Tries:
    """Tries values of one quantity. `power`: of a value, with which its time and memory grow at first guess."""

    def __init__(self, model: Model, what: str, unit: int) -> None:
        self._model, self._what, self._unit = model, what, unit
        self.power = 1 if what == "batch" else 2
        self._taken: list[tuple[int, int]] = []
        self._free = None if model.case.device.startswith("cuda") else memory.free_bytes()

    def __call__(self, value: int) -> float | None:
        """The seconds that a value took, None where it does not fit."""
        if self._free is not None and self._foretold(value) > self._free:
            return None
        before = memory.rss_bytes()
        memory.reset_host_peak()
        began = time.perf_counter()
        if not _try(self._model, **{self._what: value * self._unit}):
            return None
        took, peak = time.perf_counter() - began, memory.host_peak_bytes()
        if peak is not None and before is not None:
            self._taken.append((value, peak - before))
            if self._free is not None and peak - before > self._free:
                return None
        return took

    def _foretold(self, value: int) -> float:
        """What it would take: as the last one did, by the growth between the last two."""
        if not self._taken:
            return 0.0
        power: float = self.power
        last, taken = self._taken[-1]
        if len(self._taken) > 1:
            earlier, took = self._taken[-2]
            if taken > took > 0 and last != earlier:
                power = min(4.0, max(self.power, math.log(taken / took) / math.log(last / earlier)))
        growth: float = (value / last) ** power
        return taken * growth * _CAUTION


def _search(fits: _Tries, until: float, most: int) -> _Search:
    """Double from one, then halve the gap.

    Args:
        fits: tries a value.
        until: no value is tried that will not end before it.
        most: the largest value.
    """
    good, seconds, bad, value = None, 0.0, None, 1
    while True:
        # An image's time grows between its convolutions' (2) and its attention's (4) power of the edge.
        growth = (value / good) ** (2 * fits.power - 1) if good is not None else 1.0
        if good is not None and time.perf_counter() + seconds * growth > until:
            return _Search(good, _TIME)
        took = fits(value)
        if took is None:
            bad = value
        else:
            good, seconds = value, took
        if good is None:
            return _Search(None, _MEMORY)
        if bad is None and good >= most:
            return _Search(good, _MOST)
        if bad is not None and bad - good <= 1:
            return _Search(good, _MEMORY)
        value = min(good * 2, most) if bad is None else (good + bad) // 2


def _try(model: Model, *, batch: int | None = None, size: int | None = None) -> bool:
    torch, case = model.torch, model.case
    tried = copy.copy(model)
    tried.case = replace(
        case,
        batch=1 if size else batch or case.batch,
        height=size or case.height,
        width=size or case.width,
        scheduler="ddim",
        steps=2 if model.task == "image-to-image" else 1,
    )
    try:
        sampling.Loop(tried)(lambda: None)
        clocks.synchronize(torch, case.device)
    except (RuntimeError, MemoryError, ValueError, SkipError):  # whatever stops a size, it is not to be had
        return False
    finally:
        gc.collect()
        if case.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return True
