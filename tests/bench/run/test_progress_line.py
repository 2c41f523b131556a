"""Tests the progress line of a case: the current activity, the number of images, and the time left for the run."""

from __future__ import annotations

import pytest

from bench.core.result import Phases, Sample, Work
from bench.launch.received_events import ReceivedEvents
from bench.run.progress_line import CaseProgress

# The case began at 100 s and takes 8 s besides its images. Its share of the budget ends at 140 s, and the budget at
# 220 s. Two cases follow.
CASE = CaseProgress("[2/4] tiny fp32", 8.0, 100.0, 140.0, 220.0, later=2)
IMAGE = Sample(4.0, (1.0,) * 4, 8.0)
PRICED = Work(flops_per_step=10, flops_per_image=40, predicted_step_seconds=1.0)


def received(
    phase: str = "samples", *, samples: int = 0, first: float | None = 5.0, work: Work = PRICED
) -> ReceivedEvents:
    phases = Phases(first_image_seconds=first)
    return ReceivedEvents(phase=phase, entered=103.0, phases=phases, work=work, samples=[IMAGE] * samples)


@pytest.mark.parametrize(
    ("phase", "activity"),
    [
        ("start", "starting its process (2 s)"),
        ("imports", "importing torch and diffusers (2 s)"),
        ("load", "loading the weights (2 s)"),
        ("first image", "the first image (2 s)"),
        ("something new", "something new (2 s)"),
    ],
)
def test_line_shows_the_phase_before_the_images_with_its_seconds(phase: str, activity: str) -> None:
    line = CASE.line(received(phase, first=None), 105.0)
    assert line.startswith(f"[2/4] tiny fp32: {activity}; about ")
    assert line.endswith(" s left for the run")


def test_line_shows_the_number_of_the_image_and_the_step_time_and_the_time_left() -> None:
    # Two of six images are done. This case needs six more, and each of the two later ones 8 s and 8 images.
    line = CASE.line(received(samples=2), 115.0)
    assert line == "[2/4] tiny fp32: image 3 of about 6, 1 s a step; about 100 s left for the run"


def test_line_counts_three_images_for_a_case_whose_share_of_the_time_is_over() -> None:
    assert "image 1 of about 3" in CASE.line(received(), 139.0)
    assert "image 3 of about 3" in CASE.line(received(samples=2), 150.0)


def test_line_counts_more_images_than_predicted() -> None:
    assert "image 9 of about 9" in CASE.line(received(samples=9), 139.0)


def test_line_does_not_count_the_checks_after_the_images_as_an_image() -> None:
    assert "6 images, the checks after the images, 1 s a step" in CASE.line(received("checks", samples=6), 139.0)


def test_time_left_for_the_run_ends_with_the_budget() -> None:
    late = CaseProgress("x", 8.0, 100.0, 140.0, 150.0, later=9)
    assert late.line(received(samples=5), 145.0).endswith("about 5 s left for the run")


def test_slow_first_image_raises_the_predicted_seconds_of_an_image() -> None:
    before, after = (CASE.line(received("first image", first=None), now) for now in (104.0, 123.0))
    assert before.endswith("about 116 s left for the run"), "predicted: 4 s an image"
    assert after.endswith("about 100 s left for the run"), "20 s an image: five of them, within the budget"


def test_line_shows_the_seconds_of_the_first_image_until_the_second_is_made() -> None:
    assert "image 1 of about 6, the first took 5 s" in CASE.line(received(), 110.0)


def test_time_left_for_the_run_includes_required_cases_beyond_the_budget() -> None:
    late = CaseProgress("x", 8.0, 100.0, 140.0, 150.0, later=9, required=2)
    # 4 s for this case, and for each of the two required ones 8 s and 7 images of 4 s.
    assert late.line(received(samples=5), 145.0).endswith("about 76 s left for the run")
