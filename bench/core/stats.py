"""Statistics over raw samples; nothing is averaged before it gets here."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.core.result import Result, Sample

FEWEST_PAIRS = 6  # as many as a median needs: see ENOUGH_SAMPLES

_RESAMPLES = 1000
_CONFIDENCE = 0.95
_ENOUGH_FOR_P90 = 20
_LEAST_QUARTER = 2


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


def paired_ratio(before: Sequence[float], after: Sequence[float]) -> Summary:
    """The median of after / before over pairs that were measured side by side, with its bootstrap interval.

    Raises:
        ValueError: there are no values, or not as many of both.
    """
    return summarize([b / a for a, b in zip(before, after, strict=True)])


def ratio(before: Sequence[float], after: Sequence[float]) -> Summary:
    """The ratio of two medians, after / before, with its bootstrap interval (both resampled); `minimum` of the minima.

    Raises:
        ValueError: there are no values.
    """
    if not before or not after:
        raise ValueError("no values")
    chance = random.Random(0)  # noqa: S311 (as above)
    median = statistics.median
    ratios = sorted(
        median(chance.choices(after, k=len(after))) / median(chance.choices(before, k=len(before)))
        for _ in range(_RESAMPLES)
    )
    tail = int(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    middle = median(after) / median(before)
    return Summary(middle, ratios[tail], ratios[-tail - 1], min(after) / min(before), min(len(before), len(after)))


def step_seconds(result: Result) -> Summary | None:
    """Seconds a denoising step, over every step of every sample.

    The steps of one image are alike and no independent draws: the interval is that of the images' medians.
    """
    values = [seconds for sample in result.samples for seconds in sample.step_seconds]
    if values:
        images = summarize([statistics.median(each.step_seconds) for each in result.samples if each.step_seconds])
        middle = statistics.median(values)
        return Summary(middle, min(images.low, middle), max(images.high, middle), min(values), len(values))
    if not values and result.work.evaluations:  # a device that tells no times of its own: its share of the whole
        values = [sample.seconds / result.work.evaluations for sample in result.samples]
    return summarize(values) if values else None


def image_seconds(result: Result) -> Summary | None:
    """Seconds an image, over every sample."""
    batch = result.case.batch
    return summarize([sample.seconds / batch for sample in result.samples]) if result.samples else None


def least_image_seconds(result: Result) -> float:
    """Seconds an image of the quickest batch, in which others on the machine had the least part; inf without any."""
    return min((sample.seconds / result.case.batch for sample in result.samples), default=float("inf"))


def p90(values: Sequence[float]) -> float | None:
    """The 90th percentile, from 20 values on: of fewer it would be one of the two largest."""
    return statistics.quantiles(values, n=10)[-1] if len(values) >= _ENOUGH_FOR_P90 else None


def drift(samples: Sequence[Sample]) -> float | None:
    """How much slower the last quarter of the images is than the first, as a share; from eight images on."""
    quarter = len(samples) // 4
    if quarter < _LEAST_QUARTER:
        return None
    first, last = (statistics.median(each.seconds for each in part) for part in (samples[:quarter], samples[-quarter:]))
    return last / first - 1


def moved(samples: Sequence[Sample]) -> float:
    """Return the drift: the medians of the first and the last third of the images, their difference over the lesser."""
    third = max(1, len(samples) // 3)
    medians = [statistics.median(each.seconds for each in part) for part in (samples[:third], samples[-third:])]
    return max(medians) / min(medians) - 1 if min(medians) > 0 else 0.0


def images_per_second(result: Result) -> float | None:
    """Images a second, from the median sample."""
    if not result.samples:
        return None
    return result.case.batch / statistics.median(sample.seconds for sample in result.samples)


def achieved_flops(result: Result) -> float | None:
    """FLOPs a second of the model's evaluations, at their median."""
    steps = step_seconds(result)
    if steps is None or not steps.median or not result.work.flops_per_step:
        return None
    return result.work.flops_per_step / steps.median


def peak_share(result: Result) -> float | None:
    """The achieved rate over the best that a matrix product or a convolution reached beside it."""
    achieved, peaks = achieved_flops(result), result.work.peak_flops_per_second
    return achieved / max(peaks.values()) if achieved is not None and peaks else None


def joules_an_image(result: Result) -> float | None:
    """The card's energy while images were made, an image; None where it tells none."""
    gpu = result.host.gpu if result.host is not None else None
    images = (len(result.warmups) + len(result.samples)) * result.case.batch
    return gpu.energy_joules / images if gpu is not None and gpu.energy_joules is not None and images else None


def cost_of_1000(result: Result, price_per_hour: float) -> float | None:
    """What a thousand images cost where an hour of the machine costs so much, in the same money."""
    seconds = image_seconds(result)
    return price_per_hour / 3600 * seconds.median * 1000 if seconds is not None else None


MIN_SAMPLES = 3
ENOUGH_SAMPLES = 6  # the fewest whose range holds the median in 95 of 100 times: 1 - 2 / 2**6 (sign test)
