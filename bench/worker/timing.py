"""Time whole sampling loops: warm-up images until their time is steady, then samples until their median is known."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.core import stats
from bench.core.result import Sample
from bench.core.stats import ENOUGH_SAMPLES, MIN_SAMPLES
from bench.core.worker_events import SampleTaken

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from typing_extensions import Self

    from bench.core.worker_events import Emit
    from bench.worker.device_timers import Clock

MAX_SAMPLES = 60
STEADY = 0.02
_WARM = 0.03  # the warm-up ends when three consecutive images differ by no more than this share
_MAX_WARMUPS = 5
_PAUSE_SECONDS = 10.0
_LEAST_SECONDS = 2.0  # a fast case makes images for at least this time; its process takes longer to start


@dataclass
class TimedImages:
    """Hold the timing of each image, in the order in which the images were made.

    The warm-up images come first, and the samples follow.
    """

    every: list[Sample] = field(default_factory=list)

    @property
    def warmups(self) -> list[Sample]:
        """Return the warm-up images: those before the first sample."""
        return self.every[: self._first()]

    @property
    def samples(self) -> list[Sample]:
        """Return the samples: the images from the first of three consecutive ones within 3 % on.

        At most five images are warm-up; the last three images are always samples.
        """
        return self.every[self._first() :]

    def _first(self) -> int:
        seconds = [sample.seconds for sample in self.every]
        for first in range(min(_MAX_WARMUPS, len(seconds) - MIN_SAMPLES) + 1):
            window = seconds[first : first + MIN_SAMPLES]
            if max(window) - min(window) <= _WARM * min(window):
                return first
        return max(0, min(_MAX_WARMUPS, len(seconds) - MIN_SAMPLES))


def until(share: float, limit: float = float("inf")) -> Callable[[TimedImages], bool]:
    """Return a function that decides whether another image is made.

    Sampling stops when at least six samples give the median to within 2 %, at 60 samples, or when `share` has passed.
    Before three images and two seconds of images it stops only at `limit`.

    Args:
        share: the time (time.perf_counter) after which no image begins.
        limit: the time by which every image has to end.
    """

    def more(images: TimedImages) -> bool:
        if images.every and time.perf_counter() + images.every[-1].seconds > limit:
            return False
        if len(images.every) < MIN_SAMPLES:
            return True
        is_late = time.perf_counter() + images.every[-1].seconds > share
        is_short = sum(image.seconds for image in images.every) < _LEAST_SECONDS
        if (is_late and not is_short) or len(images.samples) >= MAX_SAMPLES:
            return False
        if len(images.samples) < ENOUGH_SAMPLES:
            return True
        return stats.summarize([sample.seconds for sample in images.samples]).spread > STEADY

    return more


def take(
    loop: Callable[[Callable[[], None]], object],
    clock: Clock,
    more: Callable[[TimedImages], bool],
    emit: Emit,
    between: Callable[[], None] = lambda: None,
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> TimedImages:
    """Time one image after another, and return their timings.

    Args:
        loop: makes one image; its argument is the clock's `mark`.
        clock: the clock of the device.
        more: decides whether another image is made; it may wait.
        emit: called with an event for each image.
        between: called every ten seconds between two images.
        around: returns a context manager; each image is made within one, which is not timed.
    """
    images = TimedImages()
    paused = time.monotonic()
    while more(images):
        with around():
            before = time.process_time()
            clock.start()
            loop(clock.mark)
            seconds, steps = clock.stop()
        images.every.append(Sample(seconds, steps, time.process_time() - before))
        emit(SampleTaken(images.every[-1]))
        if time.monotonic() - paused > _PAUSE_SECONDS:
            between()
            paused = time.monotonic()
    return images


class PhaseTimer:
    """Time the components of a loop while the context is active.

    A CUDA device is timed by events, any other by the host's clock.
    """

    def __init__(self, torch: Any, device: str, parts: dict[str, tuple[Any, str]]) -> None:
        """Store {name: (object, name of its function)} of the components."""
        self._torch = torch
        self._device = device
        self._parts = parts
        self._kept: dict[str, Callable[..., Any]] = {}
        self._marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in parts}

    def __enter__(self) -> Self:
        for name, (owner, function) in self._parts.items():
            setattr(owner, function, self._timed(name, getattr(owner, function)))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, function in self._parts.values():
            vars(owner).pop(function, None)
        for name, original in self._kept.items():
            setattr(*self._parts[name], original)

    def seconds(self) -> dict[str, float]:
        """Return {name: seconds of all its calls}; the device has to be idle."""
        return {name: sum(self._between(*pair) for pair in pairs) for name, pairs in self._marks.items()}

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        owner, function = self._parts[name]
        if function in vars(owner):  # it is compiled or hooked already, and has to be restored at the end
            self._kept[name] = call

        @functools.wraps(call)  # a pipeline inspects the signature of the scheduler's function
        def timed(*args: Any, **named: Any) -> Any:
            begin = self._now()
            result = call(*args, **named)
            self._marks[name].append((begin, self._now()))
            return result

        return timed

    def _now(self) -> Any:
        if not self._device.startswith("cuda"):
            return time.perf_counter()
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._torch.cuda.current_stream(self._device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) / 1000.0 if self._device.startswith("cuda") else end - begin)
