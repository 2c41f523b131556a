"""The statistics: a median, and an interval that says how well it is known."""

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
def test_the_interval_holds_the_median_and_lies_within_the_samples(values: list[float]) -> None:
    found = summarize(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert found.minimum == min(values)
    assert found.count == len(values)
    assert found.spread >= 0


@settings(max_examples=20, deadline=None)
@given(values=SECONDS)
def test_the_same_samples_give_the_same_interval(values: list[float]) -> None:
    # Whatever else drew from the global generator in between must not show.
    first = summarize(values)
    random.random()  # noqa: S311 (the point is to disturb it)
    assert summarize(values) == first


def test_the_median_is_not_moved_by_one_slow_sample() -> None:
    assert summarize([1.0, 1.1, 0.9, 1.0, 60.0]).median == 1.0


def test_more_samples_narrow_the_interval() -> None:
    chance = random.Random(1)  # noqa: S311 (made-up samples)
    values = [chance.gauss(10, 1) for _ in range(400)]
    few, more, many = (summarize(values[:count]).spread for count in (8, 60, 400))
    assert few > more > many > 0


def test_the_interval_is_the_one_of_95_percent() -> None:
    # Of 20 samples, 1 to 20, order statistics put it between the 6th and the 15th (binomial, exact).
    found = summarize([float(value) for value in range(1, 21)])
    assert 5 <= found.low <= 8
    assert 13 <= found.high <= 16


def test_equal_samples_leave_no_doubt() -> None:
    assert summarize([0.25] * 7) == Summary(median=0.25, low=0.25, high=0.25, minimum=0.25, count=7)
    assert summarize([0.25] * 7).spread == 0


def test_the_spread_is_half_the_interval_over_the_median() -> None:
    assert Summary(median=4.0, low=3.0, high=5.0, minimum=3.0, count=9).spread == pytest.approx(0.25)


def test_a_median_of_nothing_has_no_spread() -> None:
    assert Summary(median=0.0, low=0.0, high=0.0, minimum=0.0, count=1).spread == 0.0


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        summarize([])


def test_a_step_is_taken_from_every_sample() -> None:
    samples = (Sample(3.0, (1.0, 2.0), 3.0), Sample(7.0, (3.0, 4.0), 7.0), Sample(5.0, (5.0,), 5.0))
    found = step_seconds(a_result(samples=samples))
    assert found is not None
    assert (found.median, found.count, found.minimum) == (3.0, 5, 1.0)


def test_images_a_second_count_the_batch() -> None:
    samples = tuple(Sample(seconds, (), 0.0) for seconds in (2.0, 4.0, 100.0))
    assert images_per_second(a_result(a_case(batch=8), samples=samples)) == 2.0


@pytest.mark.parametrize("samples", [(), (Sample(1.0, (), 1.0),)])
def test_without_steps_there_is_no_step_time(samples: tuple[Sample, ...]) -> None:
    assert step_seconds(a_result(samples=samples)) is None


def test_without_samples_there_is_no_rate() -> None:
    assert images_per_second(a_result(samples=())) is None


def test_drift_is_how_much_slower_the_last_images_are() -> None:
    samples = [Sample(seconds, (), seconds) for seconds in (1.0, 1.0, 1.05, 1.05, 1.05, 1.05, 1.1, 1.1)]
    assert drift(samples) == pytest.approx(0.1)
    assert drift(samples[:7]) is None, "too few to tell"


def test_a_ratio_is_of_the_later_over_the_earlier() -> None:
    found = ratio([1.0, 2.0, 2.0], [2.0, 3.0, 3.0])
    assert (found.median, found.minimum) == (1.5, 2.0)


def test_steps_of_one_image_are_no_independent_draws() -> None:
    """A hundred equal steps in each of two unlike images tell no more than the two images do."""
    samples = (Sample(100.0, (1.0,) * 100, 1.0), Sample(120.0, (1.2,) * 100, 1.0))
    found = step_seconds(a_result(samples=samples))
    assert found is not None
    assert (found.low, found.high, found.count) == (1.0, 1.2, 200)
