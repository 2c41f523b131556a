"""Tests the events that a parent receives: valid and invalid lines, and the limit of silence of a worker."""

from __future__ import annotations

import math

import pytest

from bench.core.result import Phases, Sample, Work
from bench.core.worker_events import CaseMeasured, DeviceCapabilities
from bench.launch import received_events
from tests.conftest import CHECKOUT


@pytest.mark.parametrize(
    ("received", "seconds"),
    [
        (received_events.ReceivedEvents(), 300.0),
        (received_events.ReceivedEvents(phase="load"), math.inf),
        (received_events.ReceivedEvents(phase="largest"), math.inf),
        (received_events.ReceivedEvents(work=Work(predicted_compile_seconds=100.0)), 600.0),
        (received_events.ReceivedEvents(work=Work(10, 40, predicted_step_seconds=5.0)), 400.0),
        (received_events.ReceivedEvents(phases=Phases(first_image_seconds=460.0)), 2600.0),
        (received_events.ReceivedEvents(samples=[Sample(100.0, (25.0,) * 4, 100.0)]), 800.0),
    ],
    ids=["start", "load", "largest batch", "predicted compilation", "predicted step", "first image", "sample"],
)
def test_silence_limit_depends_on_the_phase_and_grows_with_the_time_of_an_image(
    received: received_events.ReceivedEvents, seconds: float
) -> None:
    assert received.silence_limit_seconds == seconds


def test_events_of_the_golden_files_are_stored_and_lines_that_are_no_events_are_counted() -> None:
    received = received_events.ReceivedEvents()
    golden = (CHECKOUT / "tests" / "data" / "worker_events").glob("*.jsonl")
    lines = {file.stem: file.read_bytes().splitlines() for file in golden}
    for name in ("query", "precisions", "links", "examine", "case"):
        for line in lines[name]:
            received_events.receive(received, None, line)
    assert received.invalid_lines == 0
    assert received.phase == "imports"
    assert received.work.flops_per_step == 34459648
    assert received.phases.load_seconds == 0.03226472399910563
    assert len(received.samples) == 1
    assert [reading.probe for reading in received.readings] == ["links", "links", "product", "product"]
    assert [probe.dtype for probe in received.precisions] == ["fp32", "fp32", "bf16", "fp16"]
    assert received.capabilities == DeviceCapabilities(tf32=0), "the last of several events counts"
    assert isinstance(received.answer, CaseMeasured)
    for line in (b"", b"hello", b'{"sample": {}}', b'{"result": {}}', b"[" * 60_000):
        received_events.receive(received, None, line)
    assert received.invalid_lines == 5
    assert isinstance(received.answer, CaseMeasured), "an invalid line does not replace the answer"
