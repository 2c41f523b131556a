"""Compute the statistics of raw samples; no value is averaged before."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.core.result import Result, Sample

FEWEST_PAIRS = 6  # as many as an interval of the median needs: see ENOUGH_SAMPLES

_RESAMPLES = 1000
_CONFIDENCE = 0.95
_ENOUGH_FOR_P90 = 20
_LEAST_QUARTER = 2


@dataclass(frozen=True)
class Summary:
    """Summarize the samples of one quantity; `low` and `high` bound the median with 95 % confidence (bootstrap)."""

    median: float
    low: float
    high: float
    minimum: float
    count: int

    @property
    def spread(self) -> float:
        """Return half the width of the interval over the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def summarize(values: Sequence[float]) -> Summary:
    """Return the median with its percentile bootstrap interval (Efron, 1979), and the minimum.

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
    """Return the median of after / before over pairs that were measured side by side, with its bootstrap interval.

    Raises:
        ValueError: there are no values, or the two have different lengths.
    """
    return summarize([b / a for a, b in zip(before, after, strict=True)])


def ratio(before: Sequence[float], after: Sequence[float]) -> Summary:
    """Return the ratio of two medians, after / before, with its bootstrap interval (both sides are resampled).

    `minimum` is the ratio of the two minima.

    Raises:
        ValueError: there are no values.
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

    The steps of one image are not independent draws, so the interval is that of the images' medians. Where a device
    gives no step times, a step is the image's time over the number of evaluations.
    """
    values = [seconds for sample in result.samples for seconds in sample.step_seconds]
    if values:
        images = summarize([statistics.median(sample.step_seconds) for sample in result.samples if sample.step_seconds])
        middle = statistics.median(values)
        return Summary(middle, min(images.low, middle), max(images.high, middle), min(values), len(values))
    if not values and result.work.evaluations:  # no step times: divide the image's time
        values = [sample.seconds / result.work.evaluations for sample in result.samples]
    return summarize(values) if values else None


def image_seconds(result: Result) -> Summary | None:
    """Return the seconds per image, over all samples; None without samples."""
    batch = result.case.batch
    return summarize([sample.seconds / batch for sample in result.samples]) if result.samples else None


def least_image_seconds(result: Result) -> float:
    """Return the seconds per image of the fastest batch, which other work disturbed least; inf without samples."""
    return min((sample.seconds / result.case.batch for sample in result.samples), default=float("inf"))


def p90(values: Sequence[float]) -> float | None:
    """Return the 90th percentile; None for fewer than 20 values, where it is one of the two largest."""
    return statistics.quantiles(values, n=10)[-1] if len(values) >= _ENOUGH_FOR_P90 else None


def drift(samples: Sequence[Sample]) -> float | None:
    """Return how much slower the last quarter of the images is than the first, as a share; None below 8 images."""
    quarter = len(samples) // 4
    if quarter < _LEAST_QUARTER:
        return None
    first, last = (
        statistics.median(sample.seconds for sample in part) for part in (samples[:quarter], samples[-quarter:])
    )
    return last / first - 1


def level_shift(samples: Sequence[Sample]) -> float:
    """Return the relative difference of the median seconds of the first and the last third of the images."""
    third = max(1, len(samples) // 3)
    medians = [statistics.median(sample.seconds for sample in part) for part in (samples[:third], samples[-third:])]
    return max(medians) / min(medians) - 1 if min(medians) > 0 else 0.0


def images_per_second(result: Result) -> float | None:
    """Return the images per second of the median sample; None without samples."""
    if not result.samples:
        return None
    return result.case.batch / statistics.median(sample.seconds for sample in result.samples)


def achieved_flops(result: Result) -> float | None:
    """Return the FLOPs a second of a median evaluation of the model; None if the time or the FLOPs are unknown."""
    steps = step_seconds(result)
    if steps is None or not steps.median or not result.work.flops_per_step:
        return None
    return result.work.flops_per_step / steps.median


def peak_share(result: Result) -> float | None:
    """Return the achieved rate over the best rate of the matrix products and convolutions measured in the same run."""
    achieved, peaks = achieved_flops(result), result.work.peak_flops_per_second
    return achieved / max(peaks.values()) if achieved is not None and peaks else None


def joules_an_image(result: Result) -> float | None:
    """Return the GPU's energy per image, warm-ups included, in joules; None if the GPU does not report its energy."""
    gpu = result.host.gpu if result.host is not None else None
    images = (len(result.warmups) + len(result.samples)) * result.case.batch
    return gpu.energy_joules / images if gpu is not None and gpu.energy_joules is not None and images else None


def cost_of_1000(result: Result, price_per_hour: float) -> float | None:
    """Return the cost of a thousand images, in the currency of the price per hour; None without samples."""
    seconds = image_seconds(result)
    return price_per_hour / 3600 * seconds.median * 1000 if seconds is not None else None


MIN_SAMPLES = 3
ENOUGH_SAMPLES = 6  # the fewest samples whose range contains the median in 95 % of cases: 1 - 2 / 2**6 (sign test)
