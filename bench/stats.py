"""Statistics over raw samples; nothing is averaged before it gets here."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.result import Result

_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """One quantity over its samples. `low` and `high` bound the median with 95 % confidence (bootstrap)."""

    median: float
    low: float
    high: float
    minimum: float
    count: int

    @property
    def spread(self) -> float:
        """Half the interval's width over the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def summarize(values: Sequence[float]) -> Summary:
    """The median with its percentile-bootstrap interval (Efron, 1979: 1000 resamples, seeded), and the minimum.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    chance = random.Random(0)  # noqa: S311 (a resampling, and the same run shall give the same interval)
    count = len(values)
    medians = sorted(statistics.median(chance.choices(values, k=count)) for _ in range(_RESAMPLES))
    tail = int(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    return Summary(statistics.median(values), medians[tail], medians[-tail - 1], min(values), count)


def step_seconds(result: Result) -> Summary | None:
    """Seconds a denoising step, over every step of every sample."""
    values = [seconds for sample in result.samples for seconds in sample.step_seconds]
    return summarize(values) if values else None


def images_per_second(result: Result) -> float | None:
    """Images a second, from the median sample."""
    if not result.samples:
        return None
    return result.case.batch / statistics.median(sample.seconds for sample in result.samples)
