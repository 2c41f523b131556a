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
    """Build a clock under which the n-th loop takes the n-th of these seconds, in a cycle."""
    durations = itertools.cycle(seconds)
    # The clock is read when a loop starts and when it stops.
    steps = itertools.chain.from_iterable((0.0, next(durations)) for _ in itertools.count())
    readings = itertools.accumulate(steps)
    return clocks.HostClock(lambda: next(readings))


FAR = float("inf")


def timed_images(
    clock: clocks.Clock, share: float, loop: Any = lambda _: None
) -> tuple[timing.TimedImages, list[WorkerEvent]]:
    """Time the images of a loop; return them and the events."""
    events: list[WorkerEvent] = []
    return timing.take(loop, clock, timing.until(share), events.append), events


def test_image_that_would_not_end_in_time_is_not_begun() -> None:
    """Check that this holds even for the third image, without which there is no result."""
    images = timing.take(lambda _: None, clock_of(1e9), timing.until(FAR, 1e9), lambda _: None)
    assert len(images.every) == 1


@pytest.mark.parametrize(
    ("seconds", "share", "warmups", "samples"),
    [
        ((2.0,), FAR, 0, stats.ENOUGH_SAMPLES),
        # Never steady: two durations in turn. The first few images do not count.
        ((1.0, 2.0), FAR, 5, timing.MAX_SAMPLES),
        # The time is used up, and there are still three images.
        ((1.0, 2.0), 0.0, 0, stats.MIN_SAMPLES),
        # The first two images are slow: the warm-up.
        ((3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), FAR, 2, stats.ENOUGH_SAMPLES),
        # Within 3 % from the start.
        ((1.015625, 1.0, 1.0078125, 1.0, 1.0, 1.0), FAR, 0, stats.ENOUGH_SAMPLES),
    ],
    ids=["steady", "unsteady", "out of time", "warming up", "nearly steady"],
)
def test_sampling_stops_when_the_median_is_known(
    seconds: tuple[float, ...], share: float, warmups: int, samples: int
) -> None:
    images, events = timed_images(clock_of(*seconds), share)
    assert (len(images.warmups), len(images.samples)) == (warmups, samples)
    assert [image.seconds for image in images.every] == list(
        itertools.islice(itertools.cycle(seconds), warmups + samples)
    )
    assert events == [SampleTaken(image) for image in images.every]


def test_two_seconds_of_images_are_made_even_without_time() -> None:
    images, _ = timed_images(clock_of(0.25, 0.5), 0.0)
    assert [image.seconds for image in images.every] == [0.25, 0.5, 0.25, 0.5, 0.25, 0.5]
    images, _ = timed_images(clock_of(0.25), 0.0)
    assert len(images.every) == stats.ENOUGH_SAMPLES, "the median is known before"


def test_disturbed_first_image_is_warm_up() -> None:
    images, _ = timed_images(clock_of(9.0, *[1.0] * timing.MAX_SAMPLES), FAR)
    assert [image.seconds for image in images.warmups] == [9.0]


def test_disturbed_samples_cause_more_samples() -> None:
    images, _ = timed_images(clock_of(1.0, 1.0, 1.03, 1.5, 1.6, 1.5, *[1.0] * timing.MAX_SAMPLES), FAR)
    assert stats.ENOUGH_SAMPLES < len(images.samples) < timing.MAX_SAMPLES


def test_loop_gets_the_clocks_mark() -> None:
    times = itertools.count()
    clock = clocks.HostClock(lambda: float(next(times)))

    def loop(mark: Any) -> None:
        mark()
        mark()
        mark()

    images, _ = timed_images(clock, 0.0, loop)
    assert {(sample.seconds, sample.step_seconds) for sample in images.every} == {(4.0, (1.0, 1.0))}


def test_pause_is_called_between_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PAUSE_SECONDS", -1.0)
    pauses: list[int] = []
    images = timing.take(
        lambda _: None, clock_of(1.0), timing.until(FAR), lambda _: None, lambda: pauses.append(len(pauses))
    )
    assert len(pauses) == len(images.every)


class Part:
    """Stand in for a component of a pipeline."""

    def forward(self, value: int) -> int:
        return value + 1


def test_parts_of_a_loop_are_timed_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.worker.timing.time", Ticking(1.0))
    plain_part, hooked = Part(), Part()
    hooked.forward = lambda value: value + 10  # type: ignore[method-assign]  # as torch.compile leaves it
    original = hooked.forward
    shares = timing.PhaseTimer(None, "cpu", {"plain": (plain_part, "forward"), "hooked": (hooked, "forward")})
    with shares:
        assert plain_part.forward(1) == 2
        assert plain_part.forward(2) == 3
        assert hooked.forward(1) == 11
    assert shares.seconds() == {"plain": 2.0, "hooked": 1.0}
    assert vars(plain_part) == {}
    assert hooked.forward is original
