"""Suites as people write them, unrolled into cases; and where a case finds real weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from bench.axes import DTYPES, LAYOUTS, SCHEDULERS, models
from bench.result import Case
from provision import spec
from provision.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from provision.paths import Root

SUITES = Path(__file__).parent / "suites"


def suites() -> list[str]:
    """Every suite that is shipped."""
    return sorted(file.stem for file in SUITES.glob("*.toml"))


def _one_of(what: str, known: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; there is: {', '.join(known)}")
        return value

    return AfterValidator(check)


Model = Annotated[str, _one_of("model", models())]
Dtype = Annotated[str, _one_of("dtype", list(DTYPES))]
Scheduler = Annotated[str, _one_of("scheduler", list(SCHEDULERS))]
Layout = Annotated[str, _one_of("layout", LAYOUTS)]


class Shape(spec.Strict):
    """What fits one kind of device. `size` is the image's edge in pixels."""

    size: Annotated[int, Field(gt=0, multiple_of=8)]
    steps: Annotated[int, Field(ge=1, le=1000)]
    batch: Annotated[int, Field(ge=1)] = 1


class Matrix(spec.Strict):
    """One block of a suite: every combination of its lists."""

    model: Model
    dtype: Annotated[list[Dtype], Field(min_length=1)]
    scheduler: Annotated[list[Scheduler], Field(min_length=1)]
    layout: Annotated[list[Layout], Field(min_length=1, default=["contiguous"])]
    cpu: Shape
    gpu: Shape


class Budget(spec.Strict):
    """Seconds that a whole suite may take, a kind of device."""

    cpu: Annotated[int, Field(gt=0)]
    cuda: Annotated[int, Field(gt=0)]
    mps: Annotated[int, Field(gt=0)]


class Suite(spec.Strict):
    """A suite's file."""

    description: str
    budget: Budget
    matrix: Annotated[list[Matrix], Field(min_length=1)]


def load_suite(name: str) -> Suite:
    """A shipped suite by its name, or a file by its path.

    Raises:
        SpecError: there is no such suite, or the file is wrong.
    """
    if name.endswith(".toml"):
        return spec.load(Path(name), Suite)
    return spec.load(SUITES / f"{spec.choose(name, suites(), 'suite')}.toml", Suite)


def unroll(
    suite: Suite, device: str, *, only_models: Sequence[str] = (), only_dtypes: Sequence[str] = ()
) -> list[Case]:
    """Every case of a suite on one device, in the file's order.

    Raises:
        SpecError: an unknown model or dtype is asked for, or nothing is left.
    """
    for name in only_models:
        spec.choose(name, models(), "model")
    for name in only_dtypes:
        spec.choose(name, list(DTYPES), "dtype")
    cases = []
    for block in suite.matrix:
        shape = block.cpu if device == "cpu" else block.gpu
        cases += [
            Case(
                block.model,
                device,
                dtype,
                scheduler,
                shape.steps,
                shape.batch,
                shape.size,
                shape.size,
                layout,
            )
            for dtype in block.dtype
            for scheduler in block.scheduler
            for layout in block.layout
            if (not only_models or block.model in only_models) and (not only_dtypes or dtype in only_dtypes)
        ]
    if not cases:
        raise SpecError("this suite has no case with that model and dtype.")
    return cases


def weights(model: str, manifest: dict[str, spec.ModelSpec], root: Root) -> Path | None:
    """The snapshot folder of the first manifest entry of this architecture whose files are all there."""
    for entry in manifest.values():
        if entry.architecture != model:
            continue
        folder = root.hub_in_use / f"models--{entry.repo.replace('/', '--')}" / "snapshots" / entry.revision
        if all(_is_whole(folder / file.path, file.size) for file in entry.files):
            return folder
    return None


def _is_whole(path: Path, size: int | None) -> bool:
    try:
        found = path.stat().st_size
    except OSError:
        return False
    return size is None or size == found
