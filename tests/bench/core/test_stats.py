"""Tests the statistics: the median and its confidence interval, ratios, drift and rates."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.core.result import Sample
from bench.core.stats import Summary, drift, images_per_second, ratio, step_seconds, summarize
from tests.bench.conftest import a_case, a_result

SECONDS = st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(values=SECONDS)
def test_interval_contains_the_median_and_lies_between_the_extreme_samples(values: list[float]) -> None:
    summary = summarize(values)
    assert min(values) <= summary.low <= summary.median <= summary.high <= max(values)
    assert summary.minimum == min(values)
    assert summary.count == len(values)
    assert summary.spread >= 0


@settings(max_examples=20, deadline=None)
@given(values=SECONDS)
def test_equal_samples_give_an_equal_summary_every_time(values: list[float]) -> None:
    # Draws from the global random generator in between must not change the result.
    first = summarize(values)
    random.random()  # noqa: S311 (disturbs the global generator)
    assert summarize(values) == first


def test_one_slow_sample_does_not_change_the_median() -> None:
    assert summarize([1.0, 1.1, 0.9, 1.0, 60.0]).median == 1.0


def test_more_samples_narrow_the_interval() -> None:
    generator = random.Random(1)  # noqa: S311 (generated samples)
    values = [generator.gauss(10, 1) for _ in range(400)]
    few, more, many = (summarize(values[:count]).spread for count in (8, 60, 400))
    assert few > more > many > 0


def test_interval_of_20_samples_lies_where_95_percent_confidence_requires() -> None:
    # By the exact binomial distribution, the interval goes from about the 6th of 20 sorted samples to the 15th.
    summary = summarize([float(value) for value in range(1, 21)])
    assert 5 <= summary.low <= 8
    assert 13 <= summary.high <= 16


def test_identical_samples_have_zero_spread() -> None:
    assert summarize([0.25] * 7) == Summary(median=0.25, low=0.25, high=0.25, minimum=0.25, count=7)
    assert summarize([0.25] * 7).spread == 0


def test_spread_is_half_the_width_of_the_interval_divided_by_the_median() -> None:
    assert Summary(median=4.0, low=3.0, high=5.0, minimum=3.0, count=9).spread == pytest.approx(0.25)


def test_spread_is_zero_for_a_median_of_zero() -> None:
    assert Summary(median=0.0, low=0.0, high=0.0, minimum=0.0, count=1).spread == 0.0


def test_summary_of_no_samples_is_rejected() -> None:
    with pytest.raises(ValueError, match="no values"):
        summarize([])


def test_step_seconds_summarizes_the_steps_of_all_samples() -> None:
    samples = (Sample(3.0, (1.0, 2.0), 3.0), Sample(7.0, (3.0, 4.0), 7.0), Sample(5.0, (5.0,), 5.0))
    summary = step_seconds(a_result(samples=samples))
    assert summary is not None
    assert (summary.median, summary.count, summary.minimum) == (3.0, 5, 1.0)


def test_images_per_second_is_the_batch_size_divided_by_the_median_seconds() -> None:
    samples = tuple(Sample(seconds, (), 0.0) for seconds in (2.0, 4.0, 100.0))
    assert images_per_second(a_result(a_case(batch=8), samples=samples)) == 2.0


@pytest.mark.parametrize("samples", [(), (Sample(1.0, (), 1.0),)], ids=["no samples", "sample without steps"])
def test_step_seconds_is_none_for_a_result_without_steps(samples: tuple[Sample, ...]) -> None:
    assert step_seconds(a_result(samples=samples)) is None


def test_images_per_second_is_none_for_a_result_without_samples() -> None:
    assert images_per_second(a_result(samples=())) is None


def test_drift_is_the_change_from_the_first_to_the_last_quarter_of_eight_or_more_images() -> None:
    samples = [Sample(seconds, (), seconds) for seconds in (1.0, 1.0, 1.05, 1.05, 1.05, 1.05, 1.1, 1.1)]
    assert drift(samples) == pytest.approx(0.1)
    assert drift(samples[:7]) is None, "fewer than 8 images"


def test_ratio_divides_the_later_median_and_minimum_by_the_earlier_ones() -> None:
    summary = ratio([1.0, 2.0, 2.0], [2.0, 3.0, 3.0])
    assert (summary.median, summary.minimum) == (1.5, 2.0)


def test_interval_of_the_step_time_is_computed_from_the_medians_of_the_images() -> None:
    """Use two images with 100 equal steps each: the interval is that of two values, and not of 200."""
    samples = (Sample(100.0, (1.0,) * 100, 1.0), Sample(120.0, (1.2,) * 100, 1.0))
    summary = step_seconds(a_result(samples=samples))
    assert summary is not None
    assert (summary.low, summary.high, summary.count) == (1.0, 1.2, 200)
