"""Clocks that a test owns: no budget, deadline or rate of a test depends on how fast or busy the machine is."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

GUARD_SECONDS = 600  # a limit against a hang is at least so long; nothing may be asserted of it


class Standing:
    """Stands in for the module `time`: no time passes but what the test adds to `now`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.monotonic()

    def time(self) -> float:
        return self.now


class Ticking(Standing):
    """Stands in for the module `time`: each reading of the clock adds a step."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self._step = step

    def monotonic(self) -> float:
        self.now += self._step
        return self.now


class Until:
    """Stands in for the module `time`: no time passes until a condition holds, then every deadline has passed.

    A few more readings of the clock come first, so that what was written until then is read.
    """

    _READINGS = 8

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition
        self._left = self._READINGS

    def monotonic(self) -> float:
        if self._left < self._READINGS or self._condition():
            self._left -= 1
        return 0.0 if self._left > 0 else math.inf


class Processor:
    """Counts the processor time of this process, so other processes take nothing of its budgets; a test may add to it.

    `own` puts it in the place of the module's clocks.
    """

    def __init__(self) -> None:
        self.added = 0.0

    def now(self) -> float:
        return time.process_time() + self.added

    def own(self) -> None:
        time.perf_counter = time.monotonic = self.now
        time.time = lambda: 1e9 + self.now()
