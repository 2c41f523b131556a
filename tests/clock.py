"""Provides clocks that a test controls, so that no timeout or rate in it depends on the speed of the machine."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

GUARD_SECONDS = 600  # the shortest timeout against a hang in a test; no test may assert on such a timeout


class Standing:
    """Replaces the module `time`; time passes only when the test adds to `now`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.monotonic()

    def time(self) -> float:
        return self.now


class Ticking(Standing):
    """Replaces the module `time`; each reading of the clock advances it by a step in seconds."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self._step = step

    def monotonic(self) -> float:
        self.now += self._step
        return self.now


class Until:
    """Replaces the module `time`; it stands at 0 until a condition holds, and is then past every deadline.

    After the condition holds, a few more readings return 0, so that data written before is still read.
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
    """Shows the CPU time of this process, so that other processes do not use up its time limits.

    A test can add seconds to `added`. `own` replaces the clocks of the module `time` with it.
    """

    def __init__(self) -> None:
        self.added = 0.0

    def now(self) -> float:
        return time.process_time() + self.added

    def own(self) -> None:
        time.perf_counter = time.monotonic = self.now
        time.time = lambda: 1e9 + self.now()
