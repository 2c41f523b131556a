"""Compute statistics from the raw samples of a case; samples are never averaged before they are stored."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.core.result import Result, Sample

FEWEST_PAIRS = 6  # pairs of samples; the interval of a median needs as many values, see ENOUGH_SAMPLES

_RESAMPLES = 1000
_CONFIDENCE = 0.95
_ENOUGH_FOR_P90 = 20
_LEAST_QUARTER = 2


@dataclass(frozen=True)
class Summary:
    """Summarize the samples of one quantity.

    `low` and `high` bound the median with 95 % confidence (percentile bootstrap). `count`: the number of samples.
    """

    median: float
    low: float
    high: float
    minimum: float
    count: int

    @property
    def spread(self) -> float:
        """Return half the width of the interval from `low` to `high`, divided by the median; 0.0 for a median of 0."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def summarize(values: Sequence[float]) -> Summary:
    """Return the median of the values with its percentile bootstrap interval (Efron, 1979), and the minimum.

    The bootstrap draws 1000 resamples from a seeded generator, so equal samples give an equal interval.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    generator = random.Random(0)  # noqa: S311 (a resampling, seeded so that it repeats)
    count = len(values)
    medians = sorted(statistics.median(generator.choices(values, k=count)) for _ in range(_RESAMPLES))
    tail = int(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    return Summary(statistics.median(values), medians[tail], medians[-tail - 1], min(values), count)


def paired_ratio(before: Sequence[float], after: Sequence[float]) -> Summary:
    """Return the median of the ratios after / before of samples that were taken in pairs, with its bootstrap interval.

    Raises:
        ValueError: there are no values, or the two sequences have different lengths.
    """
    return summarize([b / a for a, b in zip(before, after, strict=True)])


def ratio(before: Sequence[float], after: Sequence[float]) -> Summary:
    """Return median(after) / median(before) with its bootstrap interval; both sides are resampled.

    `minimum` is min(after) / min(before).

    Raises:
        ValueError: a side has no values.
    """
    if not before or not after:
        raise ValueError("no values")
    generator = random.Random(0)  # noqa: S311 (as above)
    median = statistics.median
    ratios = sorted(
        median(generator.choices(after, k=len(after))) / median(generator.choices(before, k=len(before)))
        for _ in range(_RESAMPLES)
    )
    tail = int(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    middle = median(after) / median(before)
    return Summary(middle, ratios[tail], ratios[-tail - 1], min(after) / min(before), min(len(before), len(after)))


def step_seconds(result: Result) -> Summary | None:
    """Return the seconds of a denoising step, over all steps of all samples; None without samples.

    The steps of one image are not independent draws, so the interval is that of the medians of the images. A device
    whose steps cannot be timed has no `step_seconds`; a step is then the time of an image over its number of
    evaluations.
    """
    values = [seconds for sample in result.samples for seconds in sample.step_seconds]
    if values:
        images = summarize([statistics.median(sample.step_seconds) for sample in result.samples if sample.step_seconds])
        middle = statistics.median(values)
        return Summary(middle, min(images.low, middle), max(images.high, middle), min(values), len(values))
    if not values and result.work.evaluations:
        values = [sample.seconds / result.work.evaluations for sample in result.samples]
    return summarize(values) if values else None


def image_seconds(result: Result) -> Summary | None:
    """Return the seconds per image over all samples; None without samples."""
    batch = result.case.batch
    return summarize([sample.seconds / batch for sample in result.samples]) if result.samples else None


def least_image_seconds(result: Result) -> float:
    """Return the seconds per image of the fastest sample, which other work disturbed least; inf without samples."""
    return min((sample.seconds / result.case.batch for sample in result.samples), default=float("inf"))


def p90(values: Sequence[float]) -> float | None:
    """Return the 90th percentile; None for fewer than 20 values.

    With fewer values it would be one of the two largest ones.
    """
    return statistics.quantiles(values, n=10)[-1] if len(values) >= _ENOUGH_FOR_P90 else None


def drift(samples: Sequence[Sample]) -> float | None:
    """Return how much slower the last quarter of the images is than the first quarter; None for fewer than 8 images.

    The result is the ratio of the median seconds minus 1; it is negative if the images became faster.
    """
    quarter = len(samples) // 4
    if quarter < _LEAST_QUARTER:
        return None
    first, last = (
        statistics.median(sample.seconds for sample in part) for part in (samples[:quarter], samples[-quarter:])
    )
    return last / first - 1


def level_shift(samples: Sequence[Sample]) -> float:
    """Return by how much the median seconds of the first and of the last third of the images differ.

    The result is the larger median over the smaller one, minus 1.
    """
    third = max(1, len(samples) // 3)
    medians = [statistics.median(sample.seconds for sample in part) for part in (samples[:third], samples[-third:])]
    return max(medians) / min(medians) - 1 if min(medians) > 0 else 0.0


def images_per_second(result: Result) -> float | None:
    """Return the images per second at the median time of the samples; None without samples."""
    if not result.samples:
        return None
    return result.case.batch / statistics.median(sample.seconds for sample in result.samples)


def achieved_flops(result: Result) -> float | None:
    """Return the FLOPs a second at the median time of a step; None if that time or the FLOPs of a step are unknown."""
    steps = step_seconds(result)
    if steps is None or not steps.median or not result.work.flops_per_step:
        return None
    return result.work.flops_per_step / steps.median


def peak_share(result: Result) -> float | None:
    """Return the achieved FLOPs a second over the best rate of the probes of the same case; None if either is unknown.

    A probe is a matrix product or a convolution.
    """
    achieved, peaks = achieved_flops(result), result.work.peak_flops_per_second
    return achieved / max(peaks.values()) if achieved is not None and peaks else None


def joules_an_image(result: Result) -> float | None:
    """Return the GPU's energy per image in joules; None if the GPU does not report its energy.

    The energy was counted over the warm-ups and the samples, so both count as images.
    """
    gpu = result.host.gpu if result.host is not None else None
    images = (len(result.warmups) + len(result.samples)) * result.case.batch
    return gpu.energy_joules / images if gpu is not None and gpu.energy_joules is not None and images else None


def cost_of_1000(result: Result, price_per_hour: float) -> float | None:
    """Return the cost of a thousand images, in the currency of the price per hour; None without samples."""
    seconds = image_seconds(result)
    return price_per_hour / 3600 * seconds.median * 1000 if seconds is not None else None


MIN_SAMPLES = 3
ENOUGH_SAMPLES = 6  # the fewest samples whose range contains the median in 95 % of cases: 1 - 2 / 2**6 (sign test)
