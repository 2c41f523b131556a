"""Provides clocks that a test controls, so that no timeout or rate in the test depends on the machine's speed."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

GUARD_SECONDS = (
    600  # the shortest timeout that a test may give to a call that could hang; no test asserts that it expires
)


class Standing:
    """Replaces the module `time`: every clock returns `now`, in seconds, which only the test changes."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.monotonic()

    def time(self) -> float:
        return self.now


class Ticking(Standing):
    """Replaces the module `time`: each reading of its monotonic clock adds `step` seconds to the time."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self._step = step

    def monotonic(self) -> float:
        self.now += self._step
        return self.now


class Until:
    """Replaces the module `time`: its clock shows 0 until a condition holds, and then infinity, past every deadline.

    The clock evaluates the condition at each reading. After the condition holds, the clock still returns 0 for seven
    readings, so that the code under test can read what was written before that moment.
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
    """Counts the CPU time of this process, so that a limit in the tested code does not expire while others compute.

    A test moves the clock forward by adding seconds to `added`. `own` makes the module `time` return this clock.
    """

    def __init__(self) -> None:
        self.added = 0.0

    def now(self) -> float:
        return time.process_time() + self.added

    def own(self) -> None:
        time.perf_counter = time.monotonic = self.now
        time.time = lambda: 1e9 + self.now()
