"""What a pipeline is made of, as people know it from printing one: read from the cache, else from its architecture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from provision.models import architectures, safetensors, stand_ins

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.models import ModelSpec

_BYTES = {"F16": 2, "F32": 4}
_CACHE = "the cache"
_DEPTH = 3  # of lists in a setting; schedulers have one
_LONGEST_NAME = 80  # of a component
# Names of element types as diffusers says them.
DTYPES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


@dataclass(frozen=True)
class Component:
    """One part. `parameters`, `dtype` and `bytes` are None where it has no weights, or nothing is known of them."""

    name: str
    library: str | None
    kind: str | None
    parameters: int | None = None
    dtype: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class PipelineStructure:
    """A whole model. `read_from`: "the cache", or "the architecture"."""

    pipeline: str | None
    components: list[Component]
    scheduler: tuple[str, dict[str, Any]] | None
    read_from: str
    faults: list[str] = field(default_factory=list)


def read(snapshot: Path, model: ModelSpec, envs: Path) -> PipelineStructure:
    """The structure of a model.

    Args:
        snapshot: where it lies in the cache, or would.
        model: its entry.
        envs: the folder with the architectures.

    Raises:
        SpecError: it is not in the cache, and nothing is known of its architecture.
    """
    if (snapshot / "model_index.json").is_file() or (snapshot / "config.json").is_file():
        return _of_cache(snapshot, model)
    return _of_architecture(architectures.load(envs, model.architecture), model)


def _of_cache(snapshot: Path, model: ModelSpec) -> PipelineStructure:
    faults: list[str] = []
    index = _json(snapshot / "model_index.json", faults) if (snapshot / "model_index.json").exists() else {}
    parts = _parts(index, faults)
    if not parts:
        config = _json(snapshot / "config.json", faults)
        told = config.get("_class_name") or config.get("architectures")
        kind = _name(told[0] if told and isinstance(told, list) else told or None, "the class in config.json", faults)
        return PipelineStructure(
            None, [_component(snapshot, "", "model", (None, kind), model, faults)], None, _CACHE, faults
        )
    scheduler = None
    components = []
    for name, (library, kind) in parts.items():
        if name == "scheduler":
            scheduler = (kind, _settings(snapshot, faults))
            continue
        # A repository with one model keeps it flat, beside the index.
        flat = not (snapshot / name).is_dir() and (snapshot / "config.json").exists()
        components.append(_component(snapshot, "" if flat else name, name, (library, kind), model, faults))
    pipeline = _name(index.get("_class_name"), "the pipeline in model_index.json", faults)
    return PipelineStructure(pipeline, components, scheduler, _CACHE, faults)


def _parts(index: dict[str, Any], faults: list[str]) -> dict[str, tuple[str | None, str]]:
    """{component: (library, class)} of a pipeline's index; a null class is a part that was left out."""
    found: dict[str, tuple[str | None, str]] = {}
    for name, told in index.items():
        if name.startswith("_") or not isinstance(told, list) or len(told) != 2 or not told[1]:
            continue
        # It names a folder, and an argument of the pipeline.
        if not (name.isidentifier() and name.isascii() and len(name) <= _LONGEST_NAME):
            faults.append(f"model_index.json has {ascii(name)[:_LONGEST_NAME]}, which cannot be a component")
            continue
        library = _name(told[0], f"the library of {name} in model_index.json", faults)
        kind = _name(told[1], f"the class of {name} in model_index.json", faults)
        if kind is not None:
            found[name] = (library, kind)
    return found


def _settings(snapshot: Path, faults: list[str]) -> dict[str, Any]:
    """The scheduler's settings, those that can be shown."""
    places = (snapshot / "scheduler" / "scheduler_config.json", snapshot / "scheduler_config.json")
    file = next((each for each in places if each.exists()), None)
    told = _json(file, faults) if file else {}
    found = {
        key: value
        for key, value in told.items()
        if not key.startswith("_") and key.isprintable() and _can_be_shown(value, _DEPTH)
    }
    if len(found) < sum(not key.startswith("_") for key in told):
        faults.append("scheduler_config.json has settings that cannot be shown")
    return found


def _component(
    snapshot: Path, folder: str, name: str, told: tuple[str | None, str | None], model: ModelSpec, faults: list[str]
) -> Component:
    if not (snapshot / folder).is_dir():
        faults.append(f"{name} is not in the cache")
        return Component(name, *told)
    count, size = 0, 0
    kinds: dict[str, int] = {}
    for file in _weights(snapshot, folder, name, model, faults):
        try:
            tensors = safetensors.read_header(file)
            size += file.stat().st_size
        except (safetensors.WeightsError, OSError) as error:
            faults.append(f"{file.name} of {name} {error}")
            continue
        for tensor in tensors.values():
            count += tensor.elements
            kinds[tensor.dtype] = kinds.get(tensor.dtype, 0) + tensor.elements
    if not kinds:
        return Component(name, *told)
    dtype = max(kinds, key=lambda each: kinds[each])
    return Component(name, *told, count, DTYPES.get(dtype, dtype.lower()), size)


def _weights(snapshot: Path, folder: str, name: str, model: ModelSpec, faults: list[str]) -> list[Path]:
    """The weights that are this model's own: those that its entry names, else those of its variant."""
    files = sorted((snapshot / folder).glob("*.safetensors"))
    named = {snapshot / file.path for file in model.files if file.path.endswith(".safetensors")}
    wanted = [file for file in named if file.parent == snapshot / folder]
    variant = model.variant
    own = [file for file in files if file in named] or [
        file for file in files if (f".{variant}." in file.name if variant else file.name.count(".") == 1)
    ]
    if not own and (files or wanted):
        faults.append(f"{name}: its {variant or 'fp32'} weights are not here")
    return own


def _of_architecture(found: architectures.Architecture, model: ModelSpec) -> PipelineStructure:
    dtype = stand_ins.dtype_of(model)
    parts = stand_ins.parts_of(model, found)
    components = [
        Component(name, library, kind, count, DTYPES[dtype], count * _BYTES[dtype])
        for name, (library, kind) in found.classes.items()
        if name in parts
        for count in (found.parameters[name],)
    ]
    others = found.tokenizers | {name: kind for name, (kind, _) in found.processors.items()}
    components += [Component(name, "transformers", kind) for name, kind in others.items()]
    return PipelineStructure(found.pipeline, components, found.scheduler, "the architecture")


def _json(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        faults.append(f"{path.name} cannot be read")
        return {}
    return found


def _name(told: object, what: str, faults: list[str]) -> str | None:
    """A name that a file tells, where it is one; what a terminal would obey is none."""
    if told is None or (isinstance(told, str) and told.isprintable()):
        return told
    faults.append(f"{what} is no name")
    return None


def _can_be_shown(value: object, depth: int) -> bool:
    if isinstance(value, str):
        return value.isprintable()
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_can_be_shown(each, depth - 1) for each in inner)
    return True
