"""Tests the timing of images: the end of the warm-up, the number of samples, and the times of components."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from bench.core import stats
from bench.core.worker_events import SampleTaken
from bench.worker import device_timers, timing
from tests.clock import Ticking

if TYPE_CHECKING:
    from bench.core.worker_events import WorkerEvent


def clock_of(*seconds: float) -> device_timers.HostClock:
    """Return a clock by which the n-th image takes the n-th of these seconds, in a cycle."""
    durations = itertools.cycle(seconds)
    # The clock is read when a loop starts and when it stops.
    steps = itertools.chain.from_iterable((0.0, next(durations)) for _ in itertools.count())
    readings = itertools.accumulate(steps)
    return device_timers.HostClock(lambda: next(readings))


FAR = float("inf")


def timed_images(
    clock: device_timers.Clock, share: float, loop: Any = lambda _: None
) -> tuple[timing.TimedImages, list[WorkerEvent]]:
    """Time images until the `share` of seconds is used up or enough are made; return them, and the events sent."""
    events: list[WorkerEvent] = []
    return timing.take(loop, clock, timing.until(share), events.append), events


def test_image_that_would_not_end_before_the_limit_is_not_begun() -> None:
    """Use images of 1e9 s: only one is made, although a result needs three."""
    images = timing.take(lambda _: None, clock_of(1e9), timing.until(FAR, 1e9), lambda _: None)
    assert len(images.every) == 1


@pytest.mark.parametrize(
    ("seconds", "share", "warmups", "samples"),
    [
        ((2.0,), FAR, 0, stats.ENOUGH_SAMPLES),
        # Two durations alternate, so the samples never become steady. The first five images are warm-up.
        ((1.0, 2.0), FAR, 5, timing.MAX_SAMPLES),
        # The time is used up from the start; three images are made even so.
        ((1.0, 2.0), 0.0, 0, stats.MIN_SAMPLES),
        # The first two images are slower than the others, and are warm-up.
        ((3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), FAR, 2, stats.ENOUGH_SAMPLES),
        # All images are within 3 % of each other.
        ((1.015625, 1.0, 1.0078125, 1.0, 1.0, 1.0), FAR, 0, stats.ENOUGH_SAMPLES),
    ],
    ids=["steady", "unsteady", "out of time", "warming up", "nearly steady"],
)
def test_number_of_warm_ups_and_samples_depends_on_steadiness_and_time(
    seconds: tuple[float, ...], share: float, warmups: int, samples: int
) -> None:
    images, events = timed_images(clock_of(*seconds), share)
    assert (len(images.warmups), len(images.samples)) == (warmups, samples)
    assert [image.seconds for image in images.every] == list(
        itertools.islice(itertools.cycle(seconds), warmups + samples)
    )
    assert events == [SampleTaken(image) for image in images.every]


def test_images_of_at_least_two_seconds_or_enough_samples_are_made_even_without_time() -> None:
    images, _ = timed_images(clock_of(0.25, 0.5), 0.0)
    assert [image.seconds for image in images.every] == [0.25, 0.5, 0.25, 0.5, 0.25, 0.5]
    images, _ = timed_images(clock_of(0.25), 0.0)
    assert len(images.every) == stats.ENOUGH_SAMPLES, "enough samples of equal duration are made before two seconds"


def test_slow_first_image_is_warm_up() -> None:
    images, _ = timed_images(clock_of(9.0, *[1.0] * timing.MAX_SAMPLES), FAR)
    assert [image.seconds for image in images.warmups] == [9.0]


def test_slow_samples_in_between_lead_to_more_samples() -> None:
    images, _ = timed_images(clock_of(1.0, 1.0, 1.03, 1.5, 1.6, 1.5, *[1.0] * timing.MAX_SAMPLES), FAR)
    assert stats.ENOUGH_SAMPLES < len(images.samples) < timing.MAX_SAMPLES


def test_loop_calls_the_mark_of_the_clock_for_its_steps() -> None:
    times = itertools.count()
    clock = device_timers.HostClock(lambda: float(next(times)))

    def loop(mark: Any) -> None:
        mark()
        mark()
        mark()

    images, _ = timed_images(clock, 0.0, loop)
    assert {(sample.seconds, sample.step_seconds) for sample in images.every} == {(4.0, (1.0, 1.0))}


def test_pause_function_is_called_after_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PAUSE_SECONDS", -1.0)
    pauses: list[int] = []
    images = timing.take(
        lambda _: None, clock_of(1.0), timing.until(FAR), lambda _: None, lambda: pauses.append(len(pauses))
    )
    assert len(pauses) == len(images.every)


class Part:
    """Stands in for a component of a pipeline, such as a UNet."""

    def forward(self, value: int) -> int:
        return value + 1


def test_methods_of_components_are_timed_and_restored_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.worker.timing.time", Ticking(1.0))
    plain_part, hooked = Part(), Part()
    hooked.forward = lambda value: value + 10  # type: ignore[method-assign]  # torch.compile also sets `forward` on the object
    original = hooked.forward
    shares = timing.PhaseTimer(None, "cpu", {"plain": (plain_part, "forward"), "hooked": (hooked, "forward")})
    with shares:
        assert plain_part.forward(1) == 2
        assert plain_part.forward(2) == 3
        assert hooked.forward(1) == 11
    assert shares.seconds() == {"plain": 2.0, "hooked": 1.0}
    assert vars(plain_part) == {}
    assert hooked.forward is original
