"""Describes the progress of a run in one line, with the predicted time that is left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.core import stats

if TYPE_CHECKING:
    from bench.launch.received_events import ReceivedEvents

_EXTRA_IMAGES = 2  # images besides the samples: the first one, and the one of the checks
_FIRST = "first image"
_PHASES = {
    "start": "starting its process",
    "imports": "importing torch and diffusers",
    "probe": "probing how fast the device is",
    "probe of the compiler": "probing the compiler",
    "load": "loading the weights",
    _FIRST: "the first image",
    "checks": "the checks after the images",
    "largest": "searching the largest batch and image",
}


@dataclass(frozen=True)
class CaseProgress:
    """Hold what the progress line of a case needs besides the events of its worker.

    `title`: the text before the progress. `overhead`: the seconds that a case takes besides its images. `began`,
    `share_ends` and `ends` are times of time.monotonic: the start of the case, the end of its share of the time, after
    which no image begins, and the end of the run's budget. `later`: the number of cases after it. `required`: the
    number of these that run even after the budget is used up.
    """

    title: str
    overhead: float
    began: float
    share_ends: float
    ends: float
    later: int = 0
    required: int = 0

    def line(self, received: ReceivedEvents, now: float | None = None) -> str:
        """Return the line: what the worker does now, the progress of the case, and the seconds left for the run."""
        now = time.monotonic() if now is None else now
        count, image = len(received.samples), _image_seconds(received, now)
        images = self._images(count, image, now)
        if count or received.phase == "samples":
            activity = f"image {min(count + 1, images)} of about {images}"
            if received.phase in {"checks", "largest"}:
                activity = f"{count} images, {_PHASES[received.phase]}"
        else:
            activity = f"{_PHASES.get(received.phase, received.phase)} ({now - received.entered:.0f} s)"
        steps = received.samples[-1].step_seconds if received.samples else ()
        if not steps and received.phases.first_image_seconds is not None:
            activity += f", the first took {received.phases.first_image_seconds:.3g} s"
        if steps:
            activity += f", {sum(steps) / len(steps):.3g} s a step"
        left = self._left(received, image, images, now)
        return f"{self.title}: {activity}; about {left:.0f} s left for the run"

    def _images(self, count: int, image: float | None, now: float) -> int:
        """Return the predicted number of images of the case: those that fit in its share of the time, three to six.

        Args:
            count: the images made so far.
            image: the seconds of an image; None if unknown.
            now: the present time (time.monotonic).
        """
        if image is None:
            return stats.ENOUGH_SAMPLES
        fitting = count + int(max(0.0, self.share_ends - now) / image)
        return max(stats.MIN_SAMPLES, count, min(stats.ENOUGH_SAMPLES, fitting))

    def _left(self, received: ReceivedEvents, image: float | None, images: int, now: float) -> float:
        """Return the predicted seconds until the end of the run.

        Each later case is assumed to take as long as this one, within the budget.

        Args:
            received: the events of the worker.
            image: the seconds of an image; None if unknown.
            images: the predicted number of images of this case.
            now: the present time (time.monotonic).
        """
        image_seconds = image or 1.0
        whole = self.overhead + (images + _EXTRA_IMAGES) * image_seconds
        done = len(received.samples) + (received.phases.first_image_seconds is not None)
        this_case = (images + _EXTRA_IMAGES - done) * image_seconds
        if done == 0:
            this_case += max(0.0, self.overhead - (now - self.began))
        within = min(self.later * whole, max(0.0, self.ends - now - this_case))
        return this_case + max(within, self.required * whole)


def _image_seconds(received: ReceivedEvents, now: float) -> float | None:
    """Return the seconds of an image: those of the last one, or a prediction for the first one; None if unknown.

    While the first image is made, it is at least the time since its begin.
    """
    if received.samples:
        return received.samples[-1].seconds
    if received.phases.first_image_seconds is not None:
        return received.phases.first_image_seconds
    work, elapsed = received.work, now - received.entered if received.phase == _FIRST else 0.0
    if work.predicted_step_seconds is None or not work.flops_per_step or not work.flops_per_image:
        return elapsed or None
    return max(elapsed, work.predicted_step_seconds * work.flops_per_image / work.flops_per_step)
