"""The pictures of a run held against each other: a dtype's against fp32's, a scheduler's against a longer solution."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.core import axes
from bench.core.result import Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.core.result import Case, Result

# Schedulers that solve the probability flow and so end where any other of them ends; the rest draw noise on the way.
_SOLVERS = {
    "ddim", "pndm", "euler", "heun", "lms", "kdpm2", "deis", "dpmpp", "dpmpp-karras", "dpmpp-2s", "unipc",
}  # fmt: skip
_EQUAL = 100.0  # decibels: JSON has no infinity, and of 8 bits no unlike pictures come near it
_LONGER = 2.0  # how many times as many evaluations a solution needs to be the one that others are held against


@dataclass(frozen=True)
class PrecisionPair:
    """One picture and the same in fp32. `psnr`: decibels, for a peak of 1; infinite where the two are equal."""

    result: Result
    plain: Result
    psnr: float


@dataclass(frozen=True)
class SchedulerAccuracy:
    """How far a scheduler's picture is from the longest solution's: root mean square of pixels in [0, 1]."""

    result: Result
    error: float


def with_psnr(results: Sequence[Result], folder: Path) -> list[Result]:
    """The results of a run, each with its picture's distance from fp32's where there is one."""
    far = {id(twin.result): min(twin.psnr, _EQUAL) for twin in twins(results, folder)}
    return [
        replace(result, numerics=replace(result.numerics, psnr=far[id(result)]))
        if id(result) in far and result.numerics is not None
        else result
        for result in results
    ]


def twins(results: Sequence[Result], folder: Path) -> list[PrecisionPair]:
    """Every picture that has the same case in fp32, as the library has it, in its run.

    PSNR is 10 log10(1 / mean squared error) of pixels in [0, 1], over all channels.

    Args:
        results: of a run.
        folder: where its pictures lie.
    """
    known = {result.case: result for result in results if result.status is Status.OK}
    found = []
    for result in known.values():
        plain = known.get(_in_fp32(result.case))
        distance = _distance(result, plain, folder) if plain is not None and plain is not result else None
        if plain is not None and distance is not None:
            found.append(PrecisionPair(result, plain, -20 * math.log10(distance) if distance else math.inf))
    return found


def solved(results: Sequence[Result], folder: Path) -> Iterator[tuple[Result, list[SchedulerAccuracy]]]:
    """The longest solution of each model and dtype, and how far the others are from it.

    A solution counts where one is that makes at least twice as many evaluations as each of them.

    Args:
        results: of a run.
        folder: where its pictures lie.
    """
    groups: dict[Case, list[Result]] = {}
    for result in results:
        if result.status is Status.OK and result.samples and _solves(result.case):
            groups.setdefault(replace(result.case, scheduler="", steps=0), []).append(result)
    for group in groups.values():
        longest = max(group, key=_evaluations)
        rest = [result for result in group if _LONGER * _evaluations(result) <= _evaluations(longest)]
        errors = [(result, _distance(result, longest, folder)) for result in rest]
        found = [SchedulerAccuracy(result, error) for result, error in errors if error is not None]
        if len(found) > 1:
            yield longest, found


def read(result: Result, folder: Path) -> bytes | None:
    """The picture of a case as PNG; None where it is not in the folder, or is none.

    Its name alone counts: a run's file may come from anywhere.
    """
    if result.numerics is None or result.numerics.image is None:
        return None
    try:
        content = (folder / Path(result.numerics.image).name).read_bytes()
    except (OSError, ValueError):  # no such file, or no name of one
        return None
    return content if content.startswith(b"\x89PNG") else None


def _in_fp32(case: Case) -> Case:
    """The same picture as the library makes it: the settings that change no more than its rounding are its own."""
    return replace(
        case,
        dtype="fp32",
        layout="contiguous",
        attention="sdpa",
        compile="eager",
        offload="none",
        vae="whole",
        threads=0,
    )


def _solves(case: Case) -> bool:
    """Whether a scheduler solves the model's probability flow; DDIM does not where it clips what it predicts."""
    if case.model not in axes.models():
        return False
    clips = axes.architecture(case.model)["scheduler"].get("clip_sample", True)
    return case.scheduler in _SOLVERS and not (case.scheduler == "ddim" and clips)


def _evaluations(result: Result) -> int:
    return result.work.evaluations or result.case.steps


def _distance(one: Result, two: Result, folder: Path) -> float | None:
    """Root mean square of the difference; None where one has no picture, or they are not of one size."""
    pixels = [_pixels(read(result, folder)) for result in (one, two)]
    if pixels[0] is None or pixels[1] is None or pixels[0].shape != pixels[1].shape:
        return None
    return float(((pixels[0] - pixels[1]) ** 2).mean() ** 0.5)


def _pixels(content: bytes | None) -> Any:
    import io

    import numpy as np
    from PIL import Image

    if content is None:
        return None
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.float64) / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # as Pillow tells damage
        return None
