"""Pictures held against each other: real PNG files, whose differences are known."""

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


def drawn(folder: Path, case: Case, grey: int, *, size: int = 4, evaluations: int | None = None) -> Result:
    """A case whose picture has one shade."""
    from PIL import Image

    Image.new("RGB", (size, size), (grey, grey, grey)).save(folder / f"{case.name}.png")
    result = a_result(case, numerics=Numerics(finite=True, image=f"{case.name}.png", image_sha256="0" * 64))
    return replace(result, work=replace(result.work, evaluations=evaluations or case.steps))


def test_a_picture_is_held_against_the_same_in_fp32(tmp_path: Path) -> None:
    plain = drawn(tmp_path, a_case(), 100)
    half = drawn(tmp_path, a_case(dtype="fp16", layout="channels_last"), 110)
    alone = drawn(tmp_path, a_case(dtype="bf16", steps=5), 100)
    (twin,) = image_quality.twins([plain, half, alone], tmp_path)
    assert (twin.result, twin.plain) == (half, plain)
    assert twin.psnr == pytest.approx(20 * math.log10(255 / 10))


def test_a_vae_that_tiles_is_held_against_the_whole(tmp_path: Path) -> None:
    plain = drawn(tmp_path, a_case(), 100)
    tiled = drawn(tmp_path, a_case(dtype="fp16", vae="tiling"), 100)
    assert [twin.plain for twin in image_quality.twins([plain, tiled], tmp_path)] == [plain]


def test_a_run_keeps_how_far_its_pictures_are(tmp_path: Path) -> None:
    results = [drawn(tmp_path, a_case(), 100), drawn(tmp_path, a_case(dtype="fp16"), 110)]
    results.append(drawn(tmp_path, a_case(dtype="bf16"), 100))
    found = [result.numerics.psnr for result in image_quality.with_psnr(results, tmp_path) if result.numerics]
    assert found == [None, pytest.approx(20 * math.log10(255 / 10)), 100.0]


def test_equal_pictures_are_infinitely_near(tmp_path: Path) -> None:
    both = [drawn(tmp_path, a_case(), 100), drawn(tmp_path, a_case(dtype="bf16"), 100)]
    (twin,) = image_quality.twins(both, tmp_path)
    assert twin.psnr == math.inf


@pytest.mark.parametrize("content", [b"no picture", b"\x89PNG\r\n\x1a\nrubbish", None])
def test_a_picture_that_cannot_be_read_is_left_out(tmp_path: Path, content: bytes | None) -> None:
    both = [drawn(tmp_path, a_case(), 100), drawn(tmp_path, a_case(dtype="bf16"), 100)]
    file = tmp_path / f"{both[1].case.name}.png"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    assert image_quality.twins(both, tmp_path) == []


def test_pictures_of_two_sizes_are_not_compared(tmp_path: Path) -> None:
    both = [drawn(tmp_path, a_case(), 100), drawn(tmp_path, a_case(dtype="bf16"), 100, size=8)]
    assert image_quality.twins(both, tmp_path) == []


def test_a_case_that_failed_has_no_twin(tmp_path: Path) -> None:
    both = [drawn(tmp_path, a_case(), 100), drawn(tmp_path, a_case(dtype="bf16"), 100)]
    assert image_quality.twins([replace(both[0], status=Status.ERROR), both[1]], tmp_path) == []


def test_schedulers_are_held_against_the_longest_solution(tmp_path: Path) -> None:
    results = [
        drawn(tmp_path, a_case(model="tiny-sd", scheduler="ddim", steps=10), 60),
        drawn(tmp_path, a_case(model="tiny-sd", scheduler="dpmpp", steps=10), 90),
        drawn(tmp_path, a_case(model="tiny-sd", scheduler="heun", steps=10), 95, evaluations=19),
        drawn(tmp_path, a_case(model="tiny-sd", scheduler="dpmpp", steps=40), 100),
        drawn(tmp_path, a_case(model="tiny-sd", scheduler="unipc", steps=30), 99),
        drawn(tmp_path, a_case(model="tiny-sd", scheduler="ddpm", steps=10), 0),
        drawn(tmp_path, a_case(model="tiny-sd", scheduler="euler-a", steps=10), 0),
        drawn(tmp_path, a_case(model="tiny-sd", scheduler="deis", steps=20), 98),
    ]
    ((longest, found),) = image_quality.solved(results, tmp_path)
    assert longest.case.steps == 40
    assert [(each.result.case.scheduler, round(each.error * 255)) for each in found] == [
        ("ddim", 40),
        ("dpmpp", 10),
        ("heun", 5),
        ("deis", 2),
    ], "half as many evaluations at most, and none that draws noise of its own"
    chart = charts.errors_over_time(longest, found, tables.label)
    assert "ddim 10 steps" in chart
    assert chart.startswith("<svg")


def test_a_scheduler_that_clips_solves_something_else(tmp_path: Path) -> None:
    """DDIM clips what ddpm-cat-256 predicts, as its configuration says; Stable Diffusion's does not."""
    for model, solvers in (("ddpm-cat-256", ["euler", "heun"]), ("stable-diffusion-v1-5", ["ddim", "euler", "heun"])):
        case = a_case(model=model, scheduler="dpmpp", steps=40)
        others = [replace(case, scheduler=name, steps=10) for name in ("ddim", "euler", "heun")]
        results = [drawn(tmp_path, each, 60) for each in (case, *others)]
        ((_, found),) = image_quality.solved(results, tmp_path)
        assert [each.result.case.scheduler for each in found] == solvers


def test_without_a_longer_solution_there_is_no_error(tmp_path: Path) -> None:
    results = [drawn(tmp_path, a_case(scheduler=name, steps=10), 60) for name in ("ddim", "dpmpp", "unipc")]
    assert list(image_quality.solved(results, tmp_path)) == []
