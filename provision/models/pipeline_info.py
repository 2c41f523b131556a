"""Reads the components of a model from its files in the cache, or from its architecture if the files are absent."""

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
_DEPTH = 3  # the deepest nesting of lists in a setting; schedulers have lists without nesting
_LONGEST_NAME = 80  # of a component, in characters
# {dtype in a safetensors file: its short name}.
DTYPES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}


@dataclass(frozen=True)
class Component:
    """Describe one component of a pipeline, such as a text encoder.

    `library` and `kind`: the library and the name of its class, such as "diffusers" and "UNet2DConditionModel"; None if
    they are not known.
    `parameters`: their number. `dtype`: the dtype of most parameters, such as "fp16". `bytes`: the size of its weights.
    These three are None for a component without weights, or if its weights are not known.
    """

    name: str
    library: str | None
    kind: str | None
    parameters: int | None = None
    dtype: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class PipelineStructure:
    """Describe the components of a model.

    `pipeline`: the name of the pipeline's class; None for a model without a pipeline.
    `scheduler`: (name of its class, settings); None without one.
    `read_from`: "the cache" or "the architecture".
    `faults`: a text for each part that is missing or invalid in the cache.
    """

    pipeline: str | None
    components: list[Component]
    scheduler: tuple[str, dict[str, Any]] | None
    read_from: str
    faults: list[str] = field(default_factory=list)


def read(snapshot: Path, model: ModelSpec, envs: Path) -> PipelineStructure:
    """Return the structure of a model.

    It is read from the snapshot if that has a model_index.json or config.json, else from the architecture.

    Args:
        snapshot: the folder of the model's snapshot; it may be missing.
        model: the entry of the manifest.
        envs: the folder `envs`, which has the architectures.

    Raises:
        SpecError: the model is not in the cache, and its architecture is unknown.
    """
    if (snapshot / "model_index.json").is_file() or (snapshot / "config.json").is_file():
        return _of_cache(snapshot, model)
    return _of_architecture(architectures.load(envs, model.architecture), model)


def _of_cache(snapshot: Path, model: ModelSpec) -> PipelineStructure:
    faults: list[str] = []
    index = _json(snapshot / "model_index.json", faults) if (snapshot / "model_index.json").exists() else {}
    classes = _classes(index, faults)
    if not classes:
        config = _json(snapshot / "config.json", faults)
        declared = config.get("_class_name") or config.get("architectures")
        class_name = _name(
            declared[0] if declared and isinstance(declared, list) else declared or None,
            "the class in config.json",
            faults,
        )
        return PipelineStructure(
            None, [_component(snapshot, "", "model", (None, class_name), model, faults)], None, _CACHE, faults
        )
    scheduler = None
    components = []
    for name, (library, class_name) in classes.items():
        if name == "scheduler":
            scheduler = (class_name, _settings(snapshot, faults))
            continue
        # A repository with one model has the files of the model at the top, in the folder of model_index.json.
        is_flat = not (snapshot / name).is_dir() and (snapshot / "config.json").exists()
        components.append(_component(snapshot, "" if is_flat else name, name, (library, class_name), model, faults))
    pipeline = _name(index.get("_class_name"), "the pipeline in model_index.json", faults)
    return PipelineStructure(pipeline, components, scheduler, _CACHE, faults)


def _classes(index: dict[str, Any], faults: list[str]) -> dict[str, tuple[str | None, str]]:
    """Return {component: (library, name of its class)} from model_index.json; a null component is left out.

    An invalid name is left out too, and a text about it is added to `faults`.
    """
    classes: dict[str, tuple[str | None, str]] = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or not value[1]:
            continue
        # The name of a component is also a folder and a Python argument.
        if not (name.isidentifier() and name.isascii() and len(name) <= _LONGEST_NAME):
            faults.append(
                f"model_index.json has {ascii(name)[:_LONGEST_NAME]}, which is not a valid name of a component"
            )
            continue
        library = _name(value[0], f"the library of {name} in model_index.json", faults)
        class_name = _name(value[1], f"the class of {name} in model_index.json", faults)
        if class_name is not None:
            classes[name] = (library, class_name)
    return classes


def _settings(snapshot: Path, faults: list[str]) -> dict[str, Any]:
    """Return the scheduler's settings that can be printed; add a text to `faults` if there are others."""
    paths = (snapshot / "scheduler" / "scheduler_config.json", snapshot / "scheduler_config.json")
    file = next((path for path in paths if path.exists()), None)
    config = _json(file, faults) if file else {}
    settings = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key.isprintable() and _is_printable(value, _DEPTH)
    }
    if len(settings) < sum(not key.startswith("_") for key in config):
        faults.append("scheduler_config.json has settings that cannot be printed")
    return settings


def _component(
    snapshot: Path,
    folder: str,
    name: str,
    library_and_class: tuple[str | None, str | None],
    model: ModelSpec,
    faults: list[str],
) -> Component:
    if not (snapshot / folder).is_dir():
        faults.append(f"{name} is not in the cache")
        return Component(name, *library_and_class)
    count, size = 0, 0
    dtypes: dict[str, int] = {}
    for file in _weights(snapshot, folder, name, model, faults):
        try:
            tensors = safetensors.read_header(file)
            size += file.stat().st_size
        except (safetensors.WeightsError, OSError) as error:
            faults.append(f"{file.name} of {name} {error}")
            continue
        for tensor in tensors.values():
            count += tensor.elements
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.elements
    if not dtypes:
        return Component(name, *library_and_class)
    dtype = max(dtypes, key=lambda dtype: dtypes[dtype])
    return Component(name, *library_and_class, count, DTYPES.get(dtype, dtype.lower()), size)


def _weights(snapshot: Path, folder: str, name: str, model: ModelSpec, faults: list[str]) -> list[Path]:
    """Return the weights of one component that belong to an entry of the manifest.

    They are the files that the entry lists. If none of these is present, they are the files with the entry's variant in
    their names. If there are none either, a text is added to `faults`.

    Args:
        snapshot: the folder of the snapshot.
        folder: the component's folder in the snapshot; "" for the snapshot itself.
        name: the name of the component.
        model: the entry of the manifest.
        faults: the list to which a text is added.
    """
    files = sorted((snapshot / folder).glob("*.safetensors"))
    named = {snapshot / file.path for file in model.files if file.path.endswith(".safetensors")}
    listed = [file for file in named if file.parent == snapshot / folder]
    variant = model.variant
    own = [file for file in files if file in named] or [
        file for file in files if (f".{variant}." in file.name if variant else file.name.count(".") == 1)
    ]
    if not own and (files or listed):
        faults.append(f"the {variant or 'fp32'} weights of {name} are missing")
    return own


def _of_architecture(architecture: architectures.Architecture, model: ModelSpec) -> PipelineStructure:
    dtype = stand_ins.dtype_of(model)
    component_names = stand_ins.parts_of(model, architecture)
    components = [
        Component(name, library, class_name, count, DTYPES[dtype], count * _BYTES[dtype])
        for name, (library, class_name) in architecture.classes.items()
        if name in component_names
        for count in (architecture.parameters[name],)
    ]
    without_weights = architecture.tokenizers | {
        name: class_name for name, (class_name, _) in architecture.processors.items()
    }
    components += [Component(name, "transformers", class_name) for name, class_name in without_weights.items()]
    return PipelineStructure(architecture.pipeline, components, architecture.scheduler, "the architecture")


def _json(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        faults.append(f"{path.name} cannot be read")
        return {}
    return content


def _name(value: object, description: str, faults: list[str]) -> str | None:
    """Return a name that was read from a file.

    None if the value is None. None too if it is not printable text; then a text with `description` is added to
    `faults`.
    """
    if value is None or (isinstance(value, str) and value.isprintable()):
        return value
    faults.append(f"{description} is not a valid name")
    return None


def _is_printable(value: object, depth: int) -> bool:
    if isinstance(value, str):
        return value.isprintable()
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_printable(item, depth - 1) for item in items)
    return True
