"""Compares the pictures of a run: those of each dtype with fp32, and those of each scheduler with a reference picture.

The reference picture is the one made with the most evaluations of the model.
"""

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

# Schedulers that solve the probability flow ODE: all of them converge to the same picture. The others add noise.
_SOLVERS = {
    "ddim", "pndm", "euler", "heun", "lms", "kdpm2", "deis", "dpmpp", "dpmpp-karras", "dpmpp-2s", "unipc",
}  # fmt: skip
_EQUAL = 100.0  # stored decibels of equal pictures: JSON has no infinity, and unequal 8-bit pictures have far fewer
_REFERENCE_FACTOR = 2.0  # the reference has at least this many times the evaluations of a compared picture


@dataclass(frozen=True)
class PrecisionPair:
    """Hold a result and that of the same case in fp32 (`plain`).

    `psnr`: the peak signal-to-noise ratio of the two pictures in decibels; infinite if they are equal.
    """

    result: Result
    plain: Result
    psnr: float


@dataclass(frozen=True)
class SchedulerAccuracy:
    """Hold the error of a scheduler's picture.

    `error`: the root mean square difference from the reference picture, with pixels in [0, 1].
    """

    result: Result
    error: float


def with_psnr(results: Sequence[Result], folder: Path) -> list[Result]:
    """Return the results of a run, with the PSNR of each picture whose case was also measured in fp32."""
    psnrs = {id(pair.result): min(pair.psnr, _EQUAL) for pair in precision_pairs(results, folder)}
    return [
        replace(result, numerics=replace(result.numerics, psnr=psnrs[id(result)]))
        if id(result) in psnrs and result.numerics is not None
        else result
        for result in results
    ]


def precision_pairs(results: Sequence[Result], folder: Path) -> list[PrecisionPair]:
    """Return a pair for each case that was also measured in fp32 with the library's default settings.

    PSNR is 10 log10(1 / mean squared error) of pixels in [0, 1], over all channels.

    Args:
        results: the results of the run.
        folder: the folder of its pictures.
    """
    by_case = {result.case: result for result in results if result.status is Status.OK}
    pairs = []
    for result in by_case.values():
        plain = by_case.get(_in_fp32(result.case))
        distance = _distance(result, plain, folder) if plain is not None and plain is not result else None
        if plain is not None and distance is not None:
            pairs.append(PrecisionPair(result, plain, -20 * math.log10(distance) if distance else math.inf))
    return pairs


def scheduler_accuracies(results: Sequence[Result], folder: Path) -> Iterator[tuple[Result, list[SchedulerAccuracy]]]:
    """Yield (reference result, errors of the other results) of each group of cases.

    The cases of a group differ only in scheduler or steps. The reference is the result with the most evaluations of the
    model. A picture is compared only if the reference has at least twice as many evaluations. Groups with fewer than
    two such pictures are left out.

    Args:
        results: the results of the run.
        folder: the folder of its pictures.
    """
    groups: dict[Case, list[Result]] = {}
    for result in results:
        if result.status is Status.OK and result.samples and _solves(result.case):
            groups.setdefault(replace(result.case, scheduler="", steps=0), []).append(result)
    for group in groups.values():
        longest = max(group, key=_evaluations)
        others = [result for result in group if _REFERENCE_FACTOR * _evaluations(result) <= _evaluations(longest)]
        errors = [(result, _distance(result, longest, folder)) for result in others]
        accuracies = [SchedulerAccuracy(result, error) for result, error in errors if error is not None]
        if len(accuracies) > 1:
            yield longest, accuracies


def read_image(result: Result, folder: Path) -> bytes | None:
    """Return the PNG file of a case's picture; None if it is not in the folder, or is no PNG.

    Only the file name of the stored path is used, since the run's file may come from an untrusted source.
    """
    if result.numerics is None or result.numerics.image is None:
        return None
    try:
        content = (folder / Path(result.numerics.image).name).read_bytes()
    except (OSError, ValueError):  # ValueError: the file name is invalid
        return None
    return content if content.startswith(b"\x89PNG") else None


def _in_fp32(case: Case) -> Case:
    """Return the same case in fp32, with the defaults for all settings that change only the rounding."""
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
    """Return whether the scheduler of a case solves the model's probability flow ODE.

    DDIM does not solve it if the scheduler configuration of the model clips the predictions.
    """
    if case.model not in axes.models():
        return False
    clips = axes.architecture(case.model)["scheduler"].get("clip_sample", True)
    return case.scheduler in _SOLVERS and not (case.scheduler == "ddim" and clips)


def _evaluations(result: Result) -> int:
    return result.work.evaluations or result.case.steps


def _distance(one: Result, two: Result, folder: Path) -> float | None:
    """Return the root mean square difference of two pictures; None if one is absent or their sizes differ."""
    pixels = [_pixels(read_image(result, folder)) for result in (one, two)]
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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's errors for a damaged file
        return None
