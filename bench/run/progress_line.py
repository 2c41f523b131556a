"""Describes the progress of a run in one line, with the predicted time that is left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.core import stats

if TYPE_CHECKING:
    from bench.launch.received_events import ReceivedEvents

_EXTRA_IMAGES = 2  # the first image, and the image of the checks
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
    """Hold the title and the time limits of a case before it begins.

    `title`: its title. `overhead`: the seconds that a case takes besides its images. `began`, `share_ends` and `ends`
    (time.monotonic): its start, the end of its share, after which no image begins, and the end of the run's budget.
    `later`: the number of cases after it; `required`: the number of these that run even over the budget.
    """

    title: str
    overhead: float
    began: float
    share_ends: float
    ends: float
    later: int = 0
    required: int = 0

    def line(self, received: ReceivedEvents, now: float | None = None) -> str:
        """Return the current activity, the progress of the case, and the seconds left for the run."""
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
        """Return the number of images that fit in the case's share of the time, within three to six."""
        if image is None:
            return stats.ENOUGH_SAMPLES
        fitting = count + int(max(0.0, self.share_ends - now) / image)
        return max(stats.MIN_SAMPLES, count, min(stats.ENOUGH_SAMPLES, fitting))

    def _left(self, received: ReceivedEvents, image: float | None, images: int, now: float) -> float:
        """Return the predicted seconds of this case and the later ones.

        Each later case takes as long as this one, within the budget.
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
    """Return the seconds of an image: those of the last one, or predicted, but at least the time since it began."""
    if received.samples:
        return received.samples[-1].seconds
    if received.phases.first_image_seconds is not None:
        return received.phases.first_image_seconds
    work, elapsed = received.work, now - received.entered if received.phase == _FIRST else 0.0
    if work.predicted_step_seconds is None or not work.flops_per_step or not work.flops_per_image:
        return elapsed or None
    return max(elapsed, work.predicted_step_seconds * work.flops_per_image / work.flops_per_step)
