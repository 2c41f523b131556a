"""Tests a run's progress line: what is done, how much, how long the rest takes."""

from __future__ import annotations

import pytest

from bench.core.result import Phases, Sample, Work
from bench.launch.received_events import ReceivedEvents
from bench.run.time_left import CaseBudget

# It began at 100 and takes 8 s beside its images; images until 140, and the whole run has until 220.
CASE = CaseBudget("[2/4] tiny fp32", 8.0, 100.0, 140.0, 220.0, later=2)
IMAGE = Sample(4.0, (1.0,) * 4, 8.0)
PRICED = Work(flops_per_step=10, flops_per_image=40, predicted_step_seconds=1.0)


def received(
    phase: str = "samples", *, samples: int = 0, first: float | None = 5.0, work: Work = PRICED
) -> ReceivedEvents:
    phases = Phases(first_image_seconds=first)
    return ReceivedEvents(phase=phase, entered=103.0, phases=phases, work=work, samples=[IMAGE] * samples)


@pytest.mark.parametrize(
    ("phase", "doing"),
    [
        ("start", "starting its process (2 s)"),
        ("imports", "importing torch and diffusers (2 s)"),
        ("load", "loading the weights (2 s)"),
        ("first image", "the first image (2 s)"),
        ("something new", "something new (2 s)"),
    ],
)
def test_each_phase_before_the_images_is_named_with_its_seconds(phase: str, doing: str) -> None:
    said = CASE.line(received(phase, first=None), 105.0)
    assert said.startswith(f"[2/4] tiny fp32: {doing}; about ")
    assert said.endswith(" s left for the run")


def test_images_are_counted_and_their_steps_told() -> None:
    # Two of six are made. This case takes six images more with the checks', the two later ones 8 + 8 images each.
    said = CASE.line(received(samples=2), 115.0)
    assert said == "[2/4] tiny fp32: image 3 of about 6, 1 s a step; about 100 s left for the run"


def test_a_share_that_is_over_means_three_images() -> None:
    assert "image 1 of about 3" in CASE.line(received(), 139.0)
    assert "image 3 of about 3" in CASE.line(received(samples=2), 150.0)


def test_more_images_than_foretold_are_counted_on() -> None:
    assert "image 9 of about 9" in CASE.line(received(samples=9), 139.0)


def test_checks_are_no_image() -> None:
    assert "6 images, the checks after the images, 1 s a step" in CASE.line(received("checks", samples=6), 139.0)


def test_what_is_left_is_within_the_budget_but_for_this_case() -> None:
    late = CaseBudget("x", 8.0, 100.0, 140.0, 150.0, later=9)
    assert late.line(received(samples=5), 145.0).endswith("about 5 s left for the run")


def test_a_first_image_that_takes_longer_than_predicted_makes_the_rest_longer() -> None:
    before, after = (CASE.line(received("first image", first=None), now) for now in (104.0, 123.0))
    assert before.endswith("about 116 s left for the run"), "as predicted: 4 s an image"
    assert after.endswith("about 100 s left for the run"), "20 s an image: five of them, within the budget"


def test_the_first_image_is_told_before_there_is_another() -> None:
    assert "image 1 of about 6, the first took 5 s" in CASE.line(received(), 110.0)


def test_what_must_be_measured_is_counted_beyond_the_budget() -> None:
    late = CaseBudget("x", 8.0, 100.0, 140.0, 150.0, later=9, required=2)
    # 4 s of this case, and 8 + 7 images of 4 s of each of the two.
    assert late.line(received(samples=5), 145.0).endswith("about 76 s left for the run")
