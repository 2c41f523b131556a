"""Reads suites from TOML, expands them into cases, and finds the snapshots with a model's weights."""

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
LOWER = "lower"  # a suite's word for the preferred one of LOW that the device has kernels for
LOW = ("bf16", "fp16")
_MAX_DIGITS = 10
_DEFAULT_SUITES = ("sampling", "pipelines", "tiny")  # the first of these with a model has the model's default case


def suites() -> list[str]:
    """Return the sorted names of the suites in bench/suites."""
    return sorted(file.stem for file in SUITES.glob("*.toml"))


def _one_of(noun: str, names: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"unknown {noun} {value!r}; valid names: {', '.join(names)}")
        return value

    return AfterValidator(check)


Model = Annotated[str, _one_of("model", axes.models())]
Task = Annotated[str, _one_of("task", sorted({task for tasks in axes.TASKS.values() for task in tasks}))]
Dtype = Annotated[str, _one_of("dtype", list(axes.DTYPES))]
SuiteDtype = Annotated[str, _one_of("dtype", [*axes.DTYPES, LOWER])]
Scheduler = Annotated[str, _one_of("scheduler", list(axes.SCHEDULERS))]
Layout = Annotated[str, _one_of("layout", axes.LAYOUTS)]
Attention = Annotated[str, _one_of("attention", list(axes.ATTENTIONS))]
Compile = Annotated[str, _one_of("compile", list(axes.COMPILES))]
Offload = Annotated[str, _one_of("offload", axes.OFFLOADS)]
Vae = Annotated[str, _one_of("vae", axes.VAES)]

_T = TypeVar("_T")


def _as_axis(value: object) -> object:
    """Return the value of an axis as a tuple; a suite may give one value or a list."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


Axis = Annotated[tuple[_T, ...], Field(min_length=1), BeforeValidator(_as_axis)]


Pixels = Annotated[int, Field(gt=0, multiple_of=8)]


class Shape(toml.Strict):
    """Describe image sizes, steps and batches for one kind of device; each is one number or a list.

    `size`: the edges of square images in pixels; `height` and `width` can replace it. `lanes`: the shape is for a CPU
    that computes at least this many fp32 numbers at once, that is, its threads times the numbers in a vector
    instruction.
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
            raise ValueError("give either size, or height and width")
        return self

    @property
    def images(self) -> list[tuple[int, int]]:
        """Return (height, width) of each image."""
        if self.size is not None:
            return [(size, size) for size in self.size]
        return list(itertools.product(self.height or (), self.width or ()))


class Matrix(toml.Strict):
    """Describe one block of a suite: its cases are all combinations of its axes.

    An absent axis has the library's default.

    `cpu`, `gpu`: the shapes for this kind of device; without them the block has no cases there. Of several shapes the
    first one that fits the device is used. The dtype "lower" means the preferred one of bf16 and fp16 that the device
    has kernels for. `required`: without the cases of this block the run is incomplete, so they come first and may
    exceed the budget. `find_max`: the largest batch and the largest image are searched too.
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
    """Hold the time budget of a suite in seconds, for each kind of device."""

    cpu: Annotated[int, Field(gt=0)]
    cuda: Annotated[int, Field(gt=0)]
    mps: Annotated[int, Field(gt=0)]


class Suite(toml.Strict):
    """Describe the file of a suite. `include`: the suites whose blocks come before its own.

    `matrix`: its own blocks.
    """

    description: str
    budget: Budget
    include: Axis[str] | None = None
    matrix: Axis[Matrix] | None = None


@dataclass(frozen=True)
class Cell:
    """Hold a case of a suite.

    `find_max`: search its largest batch and image. `required`: without this case the run is incomplete.
    """

    case: Case
    find_max: bool = False
    required: bool = False


@dataclass(frozen=True)
class Capabilities:
    """Describe the number formats of a device, and the width of a CPU.

    `lower`: what the dtype "lower" of a suite means; None: no dtype. `without`: the dtypes that the device has no
    kernels for. `lanes`: the fp32 numbers that a CPU computes at once; None if unknown.
    """

    lower: str | None = None
    without: frozenset[str] = frozenset()
    lanes: float | None = None


def load_suite(name: str) -> Suite:
    """Return a suite of this package by its name, or of a TOML file by its path.

    The blocks of included suites are in it.

    Raises:
        SpecError: no suite has this name, or the file is invalid.
    """
    return _load_suite(name, ())


def _load_suite(name: str, within: tuple[str, ...]) -> Suite:
    if name in within:
        raise SpecError(f"suite {name} includes itself: {' > '.join((*within, name))}.")
    if name.endswith(".toml"):
        suite = toml.load(Path(name), Suite)
    else:
        suite = toml.load(SUITES / f"{toml.choose(name, suites(), 'suite')}.toml", Suite)
    included = [_load_suite(other, (*within, name)) for other in suite.include or ()]
    blocks = [block for other in included for block in other.matrix or ()]
    if not (blocks or suite.matrix):
        raise SpecError(f"suite {name} has no cases. Add a [[matrix]] block or an include.")
    return suite.model_copy(update={"matrix": (*blocks, *(suite.matrix or ())), "include": None})


def unroll(
    suite: Suite,
    device: str,
    *,
    only_models: Sequence[str] = (),
    only_dtypes: Sequence[str] = (),
    changes: Mapping[str, str] | None = None,
    capabilities: Capabilities | None = None,
) -> list[Cell]:
    """Return all cases of a suite on one device, in the order of the file, without duplicates.

    Args:
        suite: the suite.
        device: the device, such as "cpu" or "cuda:0".
        only_models: keep only the cases of these models; empty keeps all.
        only_dtypes: keep only the cases in these dtypes; empty keeps all.
        changes: {axis: value} to set in every case.
        capabilities: the number formats of the device. Dtypes without kernels are left out, unless `only_dtypes` or
            `changes` names a dtype.

    Raises:
        SpecError: a model, dtype, axis or value is unknown, or no case is left.
    """
    check_names(only_models, only_dtypes)
    capabilities = capabilities or Capabilities()
    is_named = bool(only_dtypes) or "dtype" in (changes or {})
    lower = tuple(name for name in only_dtypes if name in LOW) or ((capabilities.lower,) if capabilities.lower else ())
    cells: dict[Case, Cell] = {}
    without = set()
    for block in suite.matrix or ():
        for case in _cases(block, device, lower, capabilities.lanes):
            if (only_models and case.model not in only_models) or (only_dtypes and case.dtype not in only_dtypes):
                continue
            changed = change(case, changes or {})
            if changed.dtype in capabilities.without and not is_named:
                without.add(changed.dtype)
                continue
            duplicate = cells.get(changed, Cell(changed))
            cells[changed] = Cell(changed, duplicate.find_max or block.find_max, duplicate.required or block.required)
    if not cells and without:
        raise SpecError(
            f"{device} has no kernels for any dtype of this suite ({', '.join(sorted(without))}). "
            "Run a suite with fp32, such as `bench run quick`, or choose another --device."
        )
    if not cells:
        raise SpecError("this suite has no case with this model and dtype on this device. See `bench list`.")
    return list(cells.values())


def default_case(model: str, device: str) -> Case:
    """Return the first case of a model in the shipped suites, with the size and the steps for this kind of device.

    Raises:
        SpecError: the model is unknown, or no suite has it for this device.
    """
    check_names([model], [])
    for name in _DEFAULT_SUITES:
        suite = load_suite(name)
        blocks = [block for block in suite.matrix or () if model in block.model]
        if any(block.cpu if device == "cpu" else block.gpu for block in blocks):
            return unroll(suite, device, only_models=[model])[0].case
    raise SpecError(f"no suite has a case of {model} on {device}. Choose another --device, or another model.")


def check_names(only_models: Sequence[str], only_dtypes: Sequence[str]) -> None:
    """Check the names of models and dtypes.

    Raises:
        SpecError: a name is unknown; the message lists the valid names.
    """
    for name in only_models:
        toml.choose(name, axes.models(), "model")
    for name in only_dtypes:
        toml.choose(name, list(axes.DTYPES), "dtype")


def change(case: Case, changes: Mapping[str, str]) -> Case:
    """Return a case with some axes changed. Names and values are those of a suite's file; `size` sets height and width.

    Raises:
        SpecError: an axis or a value is unknown.
    """
    if not changes:
        return case
    fields = dataclasses.asdict(case)
    names = {"model", "task", "dtype", "scheduler", "layout", "attention", "compile", "offload", "vae", "threads"}
    for axis in changes:
        toml.choose(axis, sorted(names | {"size", "height", "width", "steps", "batch"}), "axis")
    settings: dict[str, object] = {name: fields[name] for name in names}
    shape = {name: fields[name] for name in ("height", "width", "steps", "batch")}
    for axis, value in changes.items():
        parsed: object = int(value) if value.isdecimal() and len(value) < _MAX_DIGITS else value
        if axis == "size":
            shape |= {"height": parsed, "width": parsed}
        else:
            (shape if axis in shape else settings)[axis] = parsed
    if settings["dtype"] == LOWER:
        toml.choose(LOWER, list(axes.DTYPES), "dtype")
    if not settings["task"]:
        del settings["task"]  # "" is the task that the model was trained for
    try:
        block = Matrix.model_validate({**settings, "cpu": shape, "gpu": shape})
    except ValidationError as error:
        first = error.errors()[0]
        axis = next((part for part in first["loc"] if isinstance(part, str) and part not in {"cpu", "gpu"}), "")
        axis = axis if axis in changes else "size"
        raise SpecError(f"{axis}={changes.get(axis, '')}: {first['msg'].removeprefix('Value error, ')}.") from None
    (changed,) = _cases(block, case.device, (), None)
    return replace(changed, seed=case.seed)


def shape_for(shapes: Sequence[Shape], lanes: float | None) -> Shape:
    """Return the first shape whose `lanes` are at most those of the device.

    If the lanes of the device are unknown (as for a GPU), this is the first shape. If none fits, it is the last one.
    """
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
        [name for declared in block.dtype for name in (lower if declared == LOWER else (declared,))],
        block.scheduler,
        block.layout,
        block.attention,
        block.compile,
        block.offload,
        block.vae,
        block.threads,
    ):
        tasks = axes.tasks(model)
        if task and task not in tasks:
            raise SpecError(f"{model} has no task {task}. Choose one of: {', '.join(tasks)}.")
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
                task="" if task == tasks[0] else task,
                attention=attention,
                compile=compile_,
                offload=offload,
                vae=vae,
                threads=threads,
            )


def weights(model: str, manifest: Mapping[str, models.ModelSpec], root: Root) -> dict[str, str]:
    """Return {architecture: snapshot folder} for the architectures of a model: its own, and its base if it has one.

    Each folder is that of the first entry in models.toml whose files are all on disk. Empty if an architecture has
    none.
    """
    base = axes.architecture(model).get("base")
    folders = {}
    for architecture in [model, *([base] if base else [])]:
        folder = _snapshot(architecture, manifest, root)
        if folder is None:
            return {}
        folders[architecture] = str(folder)
    return folders


def _snapshot(architecture: str, manifest: Mapping[str, models.ModelSpec], root: Root) -> Path | None:
    for entry in manifest.values():
        if entry.architecture != architecture:
            continue
        folder = root.hub_in_use / f"models--{entry.repo.replace('/', '--')}" / "snapshots" / entry.revision
        if all(_is_complete(folder / file.path, file.size) for file in entry.files):
            return folder
    return None


def _is_complete(path: Path, size: int | None) -> bool:
    try:
        actual = path.stat().st_size
    except OSError:
        return False
    return size is None or size == actual
