"""The silence after which a worker counts as hung."""

from __future__ import annotations

import math

import pytest

from bench.core.result import Phases, Sample, Work
from bench.launch import worker_events


@pytest.mark.parametrize(
    ("heard", "seconds"),
    [
        (worker_events.WorkerEvents(), 300.0),
        (worker_events.WorkerEvents(phase="load"), math.inf),
        (worker_events.WorkerEvents(phase="largest"), math.inf),
        (worker_events.WorkerEvents(work=Work(predicted_compile_seconds=100.0)), 600.0),
        (worker_events.WorkerEvents(work=Work(10, 40, predicted_step_seconds=5.0)), 400.0),
        (worker_events.WorkerEvents(phases=Phases(first_image_seconds=460.0)), 2600.0),
        (worker_events.WorkerEvents(samples=[Sample(100.0, (25.0,) * 4, 100.0)]), 800.0),
    ],
)
def test_a_worker_may_be_silent_as_long_as_its_images_take(heard: worker_events.WorkerEvents, seconds: float) -> None:
    assert heard.patience == seconds
