"""Suites as people write them, unrolled into cases; and where a case finds real weights."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from bench.core import axes
from bench.core.result import Case
from provision.config import models, toml
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from provision.core.layout import Root

SUITES = Path(__file__).parent.parent / "suites"
LOWER = "lower"  # a suite's word for the best low precision of the device
LOW = ("bf16", "fp16")
_LONGEST_NUMBER = 10  # digits
_USUAL = ("sampling", "pipelines", "tiny")  # the first that has a model says what is usual


def suites() -> list[str]:
    """Every suite that is shipped."""
    return sorted(file.stem for file in SUITES.glob("*.toml"))


def _one_of(what: str, known: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; there is: {', '.join(known)}")
        return value

    return AfterValidator(check)


Model = Annotated[str, _one_of("model", axes.models())]
Task = Annotated[str, _one_of("task", sorted({task for known in axes.TASKS.values() for task in known}))]
Dtype = Annotated[str, _one_of("dtype", list(axes.DTYPES))]
SuiteDtype = Annotated[str, _one_of("dtype", [*axes.DTYPES, LOWER])]
Scheduler = Annotated[str, _one_of("scheduler", list(axes.SCHEDULERS))]
Layout = Annotated[str, _one_of("layout", axes.LAYOUTS)]
Attention = Annotated[str, _one_of("attention", list(axes.ATTENTIONS))]
Compile = Annotated[str, _one_of("compile", list(axes.COMPILES))]
Offload = Annotated[str, _one_of("offload", axes.OFFLOADS)]
Vae = Annotated[str, _one_of("vae", axes.VAES)]

_T = TypeVar("_T")


def _as_axis(given: object) -> object:
    """One value, or a list of them."""
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


Axis = Annotated[tuple[_T, ...], Field(min_length=1), BeforeValidator(_as_axis)]


Pixels = Annotated[int, Field(gt=0, multiple_of=8)]


class Shape(toml.Strict):
    """What fits one kind of device; each is one number or a list.

    `size` is the edge of a square image in pixels; `height` and `width` stand instead of it. `lanes`: this one is for
    a CPU that computes at least so many numbers of fp32 at once: threads times what an instruction takes.
    """

    lanes: Annotated[int, Field(gt=0)] | None = None
    size: Axis[Pixels] | None = None
    height: Axis[Pixels] | None = None
    width: Axis[Pixels] | None = None
    steps: Axis[Annotated[int, Field(ge=1, le=1000)]]
    batch: Axis[Annotated[int, Field(ge=1)]] = (1,)

    @model_validator(mode="after")
    def _one_way(self) -> Shape:
        if (self.size is None) == (self.height is None) or (self.height is None) != (self.width is None):
            raise ValueError("an image has a size, or a height and a width")
        return self

    @property
    def images(self) -> list[tuple[int, int]]:
        """(height, width) of each."""
        if self.size is not None:
            return [(size, size) for size in self.size]
        return list(itertools.product(self.height or (), self.width or ()))


class Matrix(toml.Strict):
    """One block of a suite: every combination of its axes; an axis that is not named is as the library has it.

    Without `cpu` (or `gpu`) the block is left out there; of several shapes the first that fits the device is taken.
    The dtype "lower" is the best low precision that the device has kernels for. `required`: the suite is not done
    without it, so it comes first, and keeps its time even over the budget. `find_max`: also search the largest batch
    and image.
    """

    model: Axis[Model]
    task: Axis[Task] = ("",)
    dtype: Axis[SuiteDtype]
    scheduler: Axis[Scheduler]
    layout: Axis[Layout] = ("contiguous",)
    attention: Axis[Attention] = ("sdpa",)
    compile: Axis[Compile] = ("eager",)
    offload: Axis[Offload] = ("none",)
    vae: Axis[Vae] = ("whole",)
    threads: Axis[Annotated[int, Field(ge=0)]] = (0,)
    cpu: Axis[Shape] | None = None
    gpu: Axis[Shape] | None = None
    find_max: bool = False
    required: bool = False


class Budget(toml.Strict):
    """Seconds that a whole suite may take, a kind of device."""

    cpu: Annotated[int, Field(gt=0)]
    cuda: Annotated[int, Field(gt=0)]
    mps: Annotated[int, Field(gt=0)]


class Suite(toml.Strict):
    """A suite's file. `include`: suites whose blocks come first."""

    description: str
    budget: Budget
    include: Axis[str] | None = None
    matrix: Axis[Matrix] | None = None


@dataclass(frozen=True)
class Cell:
    """A case of a suite; whether its largest batch and image are searched, and whether it must be measured."""

    case: Case
    find_max: bool = False
    required: bool = False


@dataclass(frozen=True)
class Capabilities:
    """Describe what a device computes with.

    `lower`: its best low precision. `without`: the dtypes that it has no kernels for. `lanes`: numbers of fp32 that
    a CPU computes at once; None where that is not known.
    """

    lower: str | None = None
    without: frozenset[str] = frozenset()
    lanes: float | None = None


def load_suite(name: str) -> Suite:
    """A shipped suite by its name, or a file by its path.

    Raises:
        SpecError: there is no such suite, or the file is wrong.
    """
    return _load_suite(name, ())


def _load_suite(name: str, within: tuple[str, ...]) -> Suite:
    if name in within:
        raise SpecError(f"suite {name} includes itself: {' > '.join((*within, name))}.")
    if name.endswith(".toml"):
        found = toml.load(Path(name), Suite)
    else:
        found = toml.load(SUITES / f"{toml.choose(name, suites(), 'suite')}.toml", Suite)
    others = [_load_suite(other, (*within, name)) for other in found.include or ()]
    blocks = [block for other in others for block in other.matrix or ()]
    if not (blocks or found.matrix):
        raise SpecError(f"suite {name}: it has no block. Give it a [[matrix]], or an include.")
    return found.model_copy(update={"matrix": (*blocks, *(found.matrix or ())), "include": None})


def unroll(
    suite: Suite,
    device: str,
    *,
    only_models: Sequence[str] = (),
    only_dtypes: Sequence[str] = (),
    changes: Mapping[str, str] | None = None,
    means: Capabilities | None = None,
) -> list[Cell]:
    """Every case of a suite on one device, in the file's order, each once.

    Args:
        suite: the suite.
        device: as a case names it.
        only_models: none but these.
        only_dtypes: none but these.
        changes: {axis: value} that every case is changed to.
        means: what the device computes with. A dtype that is asked for by name is tried without kernels, too.

    Raises:
        SpecError: an unknown model, dtype, axis or value is asked for, or nothing is left.
    """
    check_picks(only_models, only_dtypes)
    means = means or Capabilities()
    is_named = bool(only_dtypes) or "dtype" in (changes or {})
    lower = tuple(name for name in only_dtypes if name in LOW) or ((means.lower,) if means.lower else ())
    cells: dict[Case, Cell] = {}
    without = set()
    for block in suite.matrix or ():
        for case in _cases(block, device, lower, means.lanes):
            if (only_models and case.model not in only_models) or (only_dtypes and case.dtype not in only_dtypes):
                continue
            changed = change(case, changes or {})
            if changed.dtype in means.without and not is_named:
                without.add(changed.dtype)
                continue
            known = cells.get(changed, Cell(changed))
            cells[changed] = Cell(changed, known.find_max or block.find_max, known.required or block.required)
    if not cells and without:
        raise SpecError(
            f"{device} has no kernels for any dtype of this suite ({', '.join(sorted(without))}). "
            "Run one with fp32, such as `bench run quick`, or name another --device."
        )
    if not cells:
        raise SpecError("this suite has no case with that model and dtype on this device.")
    return list(cells.values())


def usual(model: str, device: str) -> Case:
    """A case of a model as the suites have it, in a size and with as many steps as fit the device.

    Raises:
        SpecError: no such model, or no suite has it for this device.
    """
    check_picks([model], [])
    for name in _USUAL:
        suite = load_suite(name)
        blocks = [block for block in suite.matrix or () if model in block.model]
        if any(block.cpu if device == "cpu" else block.gpu for block in blocks):
            return unroll(suite, device, only_models=[model])[0].case
    raise SpecError(f"no suite says which size of {model} fits {device}.")


def check_picks(only_models: Sequence[str], only_dtypes: Sequence[str]) -> None:
    """Refuse a name that stands for no model or dtype.

    Raises:
        SpecError: it does not; the message lists what does.
    """
    for name in only_models:
        toml.choose(name, axes.models(), "model")
    for name in only_dtypes:
        toml.choose(name, list(axes.DTYPES), "dtype")


def change(case: Case, changes: Mapping[str, str]) -> Case:
    """A case with some axes changed, by their names and values as a suite has them; `size` is both edges.

    Raises:
        SpecError: no such axis, or no such value.
    """
    if not changes:
        return case
    fields = dataclasses.asdict(case)
    known = {"model", "task", "dtype", "scheduler", "layout", "attention", "compile", "offload", "vae", "threads"}
    for axis in changes:
        toml.choose(axis, sorted(known | {"size", "height", "width", "steps", "batch"}), "axis")
    told: dict[str, object] = {name: fields[name] for name in known}
    shape = {name: fields[name] for name in ("height", "width", "steps", "batch")}
    for axis, value in changes.items():
        whole: object = int(value) if value.isdecimal() and len(value) < _LONGEST_NUMBER else value
        if axis == "size":
            shape |= {"height": whole, "width": whole}
        else:
            (shape if axis in shape else told)[axis] = whole
    if told["dtype"] == LOWER:
        toml.choose(LOWER, list(axes.DTYPES), "dtype")
    if not told["task"]:
        del told["task"]  # what the model was trained for
    try:
        block = Matrix.model_validate({**told, "cpu": shape, "gpu": shape})
    except ValidationError as error:
        first = error.errors()[0]
        axis = next((part for part in first["loc"] if isinstance(part, str) and part not in {"cpu", "gpu"}), "")
        axis = axis if axis in changes else "size"
        raise SpecError(f"{axis}={changes.get(axis, '')}: {first['msg'].removeprefix('Value error, ')}.") from None
    (changed,) = _cases(block, case.device, (), None)
    return replace(changed, seed=case.seed)


def shape_for(shapes: Sequence[Shape], lanes: float | None) -> Shape:
    """Return the first shape that fits a device; the last one fits every device, and the first one that is no CPU."""
    fitting = (shape for shape in shapes if lanes is None or (shape.lanes or 0) <= lanes)
    return next(fitting, shapes[-1])


def _cases(block: Matrix, device: str, lower: tuple[str, ...], lanes: float | None) -> Iterator[Case]:
    shapes = block.cpu if device == "cpu" else block.gpu
    if shapes is None:
        return
    shape = shape_for(shapes, lanes)
    for model, task, dtype, scheduler, layout, attention, compile_, offload, vae, threads in itertools.product(
        block.model,
        block.task,
        [name for told in block.dtype for name in (lower if told == LOWER else (told,))],
        block.scheduler,
        block.layout,
        block.attention,
        block.compile,
        block.offload,
        block.vae,
        block.threads,
    ):
        known = axes.tasks(model)
        if task and task not in known:
            raise SpecError(f"{model} cannot do {task}; there is: {', '.join(known)}.")
        for (height, width), steps, batch in itertools.product(shape.images, shape.steps, shape.batch):
            yield Case(
                model,
                device,
                dtype,
                scheduler,
                steps,
                batch,
                height,
                width,
                layout=layout,
                task="" if task == known[0] else task,
                attention=attention,
                compile=compile_,
                offload=offload,
                vae=vae,
                threads=threads,
            )


def weights(model: str, manifest: Mapping[str, models.ModelSpec], root: Root) -> dict[str, str]:
    """{architecture: the snapshot folder of the first entry of it whose files are all there}.

    Empty where one of the architectures that make up the model is not there.
    """
    base = axes.architecture(model).get("base")
    found = {}
    for architecture in [model, *([base] if base else [])]:
        folder = _snapshot(architecture, manifest, root)
        if folder is None:
            return {}
        found[architecture] = str(folder)
    return found


def _snapshot(architecture: str, manifest: Mapping[str, models.ModelSpec], root: Root) -> Path | None:
    for entry in manifest.values():
        if entry.architecture != architecture:
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
