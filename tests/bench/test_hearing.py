"""The silence after which a worker counts as hung."""

from __future__ import annotations

import math

import pytest

from bench import hearing
from bench.result import Phases, Sample, Work


@pytest.mark.parametrize(
    ("heard", "seconds"),
    [
        (hearing.Heard(), 300.0),
        (hearing.Heard(phase="load"), math.inf),
        (hearing.Heard(phase="largest"), math.inf),
        (hearing.Heard(work=Work(predicted_compile_seconds=100.0)), 600.0),
        (hearing.Heard(work=Work(10, 40, predicted_step_seconds=5.0)), 400.0),
        (hearing.Heard(phases=Phases(first_image_seconds=460.0)), 2600.0),
        (hearing.Heard(samples=[Sample(100.0, (25.0,) * 4, 100.0)]), 800.0),
    ],
)
def test_a_worker_may_be_silent_as_long_as_its_images_take(heard: hearing.Heard, seconds: float) -> None:
    assert heard.patience == seconds
