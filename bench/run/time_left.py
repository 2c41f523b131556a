"""Predicts a run's remaining time, and describes its progress in one line."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.core import stats

if TYPE_CHECKING:
    from bench.launch.received_events import ReceivedEvents

_IMAGES_BESIDE = 2  # the first one, and the one that is looked into
_FIRST = "first image"
_PHASES = {
    "start": "starting its process",
    "imports": "importing torch and diffusers",
    "probe": "probing how fast the device is",
    "probe of the compiler": "probing the compiler",
    "load": "loading the weights",
    _FIRST: "the first image",
    "checks": "the checks after the images",
    "largest": "searching the largest that fits",
}


@dataclass(frozen=True)
class CaseBudget:
    """Hold what is known of a case before it begins.

    `what` names it. `overhead`: seconds that a case takes beside its images. `began`, `share_ends` and `ends` are
    of time.monotonic: when it began, when it takes no further image, and when the budget of the whole run ends.
    `later`: how many cases come after it, and `required` of them whatever the budget is.
    """

    what: str
    overhead: float
    began: float
    share_ends: float
    ends: float
    later: int = 0
    required: int = 0

    def line(self, received: ReceivedEvents, now: float | None = None) -> str:
        """Say what is being done, how much is done, and how long the whole run still takes."""
        now = time.monotonic() if now is None else now
        count, image = len(received.samples), _image_seconds(received, now)
        images = self._images(count, image, now)
        if count or received.phase == "samples":
            doing = f"image {min(count + 1, images)} of about {images}"
            if received.phase in {"checks", "largest"}:
                doing = f"{count} images, {_PHASES[received.phase]}"
        else:
            doing = f"{_PHASES.get(received.phase, received.phase)} ({now - received.entered:.0f} s)"
        steps = received.samples[-1].step_seconds if received.samples else ()
        if not steps and received.phases.first_image_seconds is not None:
            doing += f", the first took {received.phases.first_image_seconds:.3g} s"
        if steps:
            doing += f", {sum(steps) / len(steps):.3g} s a step"
        left = self._left(received, image, images, now)
        return f"{self.what}: {doing}; about {left:.0f} s left for the run"

    def _images(self, count: int, image: float | None, now: float) -> int:
        """Return how many images its share of the time allows: at least three, six where they agree."""
        if image is None:
            return stats.ENOUGH_SAMPLES
        fitting = count + int(max(0.0, self.share_ends - now) / image)
        return max(stats.MIN_SAMPLES, count, min(stats.ENOUGH_SAMPLES, fitting))

    def _left(self, received: ReceivedEvents, image: float | None, images: int, now: float) -> float:
        """Seconds of this case and the later ones: those take what this one does, within the budget."""
        each = image or 1.0
        whole = self.overhead + (images + _IMAGES_BESIDE) * each
        done = len(received.samples) + (received.phases.first_image_seconds is not None)
        this = (images + _IMAGES_BESIDE - done) * each
        if done == 0:
            this += max(0.0, self.overhead - (now - self.began))
        within = min(self.later * whole, max(0.0, self.ends - now - this))
        return this + max(within, self.required * whole)


def _image_seconds(received: ReceivedEvents, now: float) -> float | None:
    """Return the seconds of an image: as the last one, else as predicted, at least what it has taken so far."""
    if received.samples:
        return received.samples[-1].seconds
    if received.phases.first_image_seconds is not None:
        return received.phases.first_image_seconds
    work, by_now = received.work, now - received.entered if received.phase == _FIRST else 0.0
    if work.predicted_step_seconds is None or not work.flops_per_step or not work.flops_per_image:
        return by_now or None
    return max(by_now, work.predicted_step_seconds * work.flops_per_image / work.flops_per_step)
