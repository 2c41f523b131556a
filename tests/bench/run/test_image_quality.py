"""Tests the comparison of pictures, with real PNG files whose differences are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.core.result import Case, Numerics, Result, Status
from bench.report import charts, tables
from bench.run import image_quality
from tests.bench.conftest import a_case, a_result

if TYPE_CHECKING:
    from pathlib import Path


def with_picture(folder: Path, case: Case, grey: int, *, size: int = 4, evaluations: int | None = None) -> Result:
    """Write a picture in one shade of grey (0 to 255), and return the result of a case that has it."""
    from PIL import Image

    Image.new("RGB", (size, size), (grey, grey, grey)).save(folder / f"{case.name}.png")
    result = a_result(case, numerics=Numerics(finite=True, image=f"{case.name}.png", image_sha256="0" * 64))
    return replace(result, work=replace(result.work, evaluations=evaluations or case.steps))


def test_picture_is_compared_with_that_of_the_same_case_in_fp32(tmp_path: Path) -> None:
    plain = with_picture(tmp_path, a_case(), 100)
    half = with_picture(tmp_path, a_case(dtype="fp16", layout="channels_last"), 110)
    alone = with_picture(tmp_path, a_case(dtype="bf16", steps=5), 100)
    (pair,) = image_quality.precision_pairs([plain, half, alone], tmp_path)
    assert (pair.result, pair.plain) == (half, plain)
    assert pair.psnr == pytest.approx(20 * math.log10(255 / 10))


def test_picture_of_a_tiled_vae_in_fp16_is_compared_with_the_untiled_one_in_fp32(tmp_path: Path) -> None:
    plain = with_picture(tmp_path, a_case(), 100)
    tiled = with_picture(tmp_path, a_case(dtype="fp16", vae="tiling"), 100)
    assert [pair.plain for pair in image_quality.precision_pairs([plain, tiled], tmp_path)] == [plain]


def test_psnr_is_none_for_fp32_and_at_most_100_for_equal_pictures(tmp_path: Path) -> None:
    results = [with_picture(tmp_path, a_case(), 100), with_picture(tmp_path, a_case(dtype="fp16"), 110)]
    results.append(with_picture(tmp_path, a_case(dtype="bf16"), 100))
    psnrs = [result.numerics.psnr for result in image_quality.with_psnr(results, tmp_path) if result.numerics]
    assert psnrs == [None, pytest.approx(20 * math.log10(255 / 10)), 100.0]


def test_psnr_of_a_pair_of_equal_pictures_is_infinite(tmp_path: Path) -> None:
    both = [with_picture(tmp_path, a_case(), 100), with_picture(tmp_path, a_case(dtype="bf16"), 100)]
    (pair,) = image_quality.precision_pairs(both, tmp_path)
    assert pair.psnr == math.inf


@pytest.mark.parametrize("content", [b"no picture", b"\x89PNG\r\n\x1a\ngarbage", None])
def test_absent_or_unreadable_picture_is_not_compared(tmp_path: Path, content: bytes | None) -> None:
    both = [with_picture(tmp_path, a_case(), 100), with_picture(tmp_path, a_case(dtype="bf16"), 100)]
    file = tmp_path / f"{both[1].case.name}.png"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    assert image_quality.precision_pairs(both, tmp_path) == []


def test_pictures_of_different_sizes_are_not_compared(tmp_path: Path) -> None:
    both = [with_picture(tmp_path, a_case(), 100), with_picture(tmp_path, a_case(dtype="bf16"), 100, size=8)]
    assert image_quality.precision_pairs(both, tmp_path) == []


def test_picture_of_a_failed_case_is_not_compared(tmp_path: Path) -> None:
    both = [with_picture(tmp_path, a_case(), 100), with_picture(tmp_path, a_case(dtype="bf16"), 100)]
    assert image_quality.precision_pairs([replace(both[0], status=Status.ERROR), both[1]], tmp_path) == []


def test_accuracy_of_a_scheduler_is_its_distance_from_the_picture_with_the_most_steps(tmp_path: Path) -> None:
    results = [
        with_picture(tmp_path, a_case(model="tiny-sd", scheduler="ddim", steps=10), 60),
        with_picture(tmp_path, a_case(model="tiny-sd", scheduler="dpmpp", steps=10), 90),
        with_picture(tmp_path, a_case(model="tiny-sd", scheduler="heun", steps=10), 95, evaluations=19),
        with_picture(tmp_path, a_case(model="tiny-sd", scheduler="dpmpp", steps=40), 100),
        with_picture(tmp_path, a_case(model="tiny-sd", scheduler="unipc", steps=30), 99),
        with_picture(tmp_path, a_case(model="tiny-sd", scheduler="ddpm", steps=10), 0),
        with_picture(tmp_path, a_case(model="tiny-sd", scheduler="euler-a", steps=10), 0),
        with_picture(tmp_path, a_case(model="tiny-sd", scheduler="deis", steps=20), 98),
    ]
    ((longest, accuracies),) = image_quality.scheduler_accuracies(results, tmp_path)
    assert longest.case.steps == 40
    assert [(item.result.case.scheduler, round(item.error * 255)) for item in accuracies] == [
        ("ddim", 40),
        ("dpmpp", 10),
        ("heun", 5),
        ("deis", 2),
    ], "at most half the evaluations, and no scheduler that adds noise"
    chart = charts.errors_over_time(longest, accuracies, tables.label)
    assert "ddim 10 steps" in chart
    assert chart.startswith("<svg")


def test_ddim_has_no_accuracy_for_a_model_with_which_it_clips(tmp_path: Path) -> None:
    # The configuration of ddpm-cat-256 makes DDIM clip its predictions; that of Stable Diffusion does not.
    for model, solvers in (("ddpm-cat-256", ["euler", "heun"]), ("stable-diffusion-v1-5", ["ddim", "euler", "heun"])):
        case = a_case(model=model, scheduler="dpmpp", steps=40)
        others = [replace(case, scheduler=name, steps=10) for name in ("ddim", "euler", "heun")]
        results = [with_picture(tmp_path, item, 60) for item in (case, *others)]
        ((_, accuracies),) = image_quality.scheduler_accuracies(results, tmp_path)
        assert [item.result.case.scheduler for item in accuracies] == solvers


def test_schedulers_have_no_accuracies_if_all_cases_have_equally_many_steps(tmp_path: Path) -> None:
    results = [with_picture(tmp_path, a_case(scheduler=name, steps=10), 60) for name in ("ddim", "dpmpp", "unipc")]
    assert list(image_quality.scheduler_accuracies(results, tmp_path)) == []
