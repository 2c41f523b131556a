"""Test timing: the end of the warm-up, the number of samples, and the shares of the parts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import stats
from bench.core.worker_events import SampleTaken
from bench.worker import clocks, timing
from tests.clock import Ticking

if TYPE_CHECKING:
    from bench.core.worker_events import WorkerEvent


def clock_of(*seconds: float) -> clocks.HostClock:
    """A clock under which loop number n takes the n-th of these times, and then from the first again."""
    durations = itertools.cycle(seconds)
    # It is read when a loop starts and when it stops.
    steps = itertools.chain.from_iterable((0.0, next(durations)) for _ in itertools.count())
    readings = itertools.accumulate(steps)
    return clocks.HostClock(lambda: next(readings))


FAR = float("inf")


def taken(
    clock: clocks.Clock, share: float, loop: Any = lambda _: None
) -> tuple[timing.TimedImages, list[WorkerEvent]]:
    events: list[WorkerEvent] = []
    return timing.take(loop, clock, timing.until(share), events.append), events


def test_an_image_that_would_not_end_in_time_is_not_begun() -> None:
    """Not even the third, without which there is no result."""
    images = timing.take(lambda _: None, clock_of(1e9), timing.until(FAR, 1e9), lambda _: None)
    assert len(images.every) == 1


@pytest.mark.parametrize(
    ("seconds", "share", "warmups", "samples"),
    [
        ((2.0,), FAR, 0, stats.ENOUGH_SAMPLES),
        # Never steady: two kinds of loop, in turn. The first few do not count.
        ((1.0, 2.0), FAR, 5, timing.MAX_SAMPLES),
        # No time for more, and still never fewer than three.
        ((1.0, 2.0), 0.0, 0, stats.MIN_SAMPLES),
        # The first two are slow: they were the warm-up.
        ((3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), FAR, 2, stats.ENOUGH_SAMPLES),
        # Within 3 % from the start.
        ((1.015625, 1.0, 1.0078125, 1.0, 1.0, 1.0), FAR, 0, stats.ENOUGH_SAMPLES),
    ],
    ids=["steady", "unsteady", "out of time", "warming up", "nearly steady"],
)
def test_samples_are_taken_until_the_median_is_known(
    seconds: tuple[float, ...], share: float, warmups: int, samples: int
) -> None:
    images, events = taken(clock_of(*seconds), share)
    assert (len(images.warmups), len(images.samples)) == (warmups, samples)
    assert [image.seconds for image in images.every] == list(
        itertools.islice(itertools.cycle(seconds), warmups + samples)
    )
    assert events == [SampleTaken(image) for image in images.every]


def test_a_disturbed_first_sample_is_warm_up() -> None:
    images, _ = taken(clock_of(9.0, *[1.0] * timing.MAX_SAMPLES), FAR)
    assert [image.seconds for image in images.warmups] == [9.0]


def test_one_disturbed_sample_asks_for_more_until_it_no_longer_matters() -> None:
    images, _ = taken(clock_of(1.0, 1.0, 1.03, 1.5, 1.6, 1.5, *[1.0] * timing.MAX_SAMPLES), FAR)
    assert stats.ENOUGH_SAMPLES < len(images.samples) < timing.MAX_SAMPLES


def test_a_loop_is_handed_the_clocks_mark_and_nothing_else() -> None:
    times = itertools.count()
    clock = clocks.HostClock(lambda: float(next(times)))

    def loop(mark: Any) -> None:
        mark()
        mark()
        mark()

    images, _ = taken(clock, 0.0, loop)
    assert {(sample.seconds, sample.step_seconds) for sample in images.every} == {(4.0, (1.0, 1.0))}


def test_between_two_images_there_is_a_pause_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PAUSE_SECONDS", -1.0)
    pauses: list[int] = []
    images = timing.take(
        lambda _: None, clock_of(1.0), timing.until(FAR), lambda _: None, lambda: pauses.append(len(pauses))
    )
    assert len(pauses) == len(images.every)


class Part:
    """Something whose work is timed."""

    def forward(self, value: int) -> int:
        return value + 1


def test_the_parts_of_a_loop_are_timed_and_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.worker.timing.time", Ticking(1.0))
    plain_part, hooked = Part(), Part()
    hooked.forward = lambda value: value + 10  # type: ignore[method-assign]  # as a compiler leaves it
    kept = hooked.forward
    shares = timing.PhaseTimer(None, "cpu", {"plain": (plain_part, "forward"), "hooked": (hooked, "forward")})
    with shares:
        assert plain_part.forward(1) == 2
        assert plain_part.forward(2) == 3
        assert hooked.forward(1) == 11
    assert shares.seconds() == {"plain": 2.0, "hooked": 1.0}
    assert vars(plain_part) == {}
    assert hooked.forward is kept
