"""What a pipeline is made of, as people know it from printing one: read from the cache, else from its architecture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from provision import architectures, stand_ins, weights

if TYPE_CHECKING:
    from pathlib import Path

    from provision.spec import ModelSpec

_BYTES = {"F16": 2, "F32": 4}
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
class Structure:
    """A whole model. `read_from`: "the cache", or "the architecture"."""

    pipeline: str | None
    components: list[Component]
    scheduler: tuple[str, dict[str, Any]] | None
    read_from: str
    faults: list[str] = field(default_factory=list)


def read(snapshot: Path, model: ModelSpec, envs: Path) -> Structure:
    """The structure of a model.

    Args:
        snapshot: where it lies in the cache, or would.
        model: its entry.
        envs: the folder with the architectures.

    Raises:
        SpecError: it is not in the cache, and nothing is known of its architecture.
    """
    if (snapshot / "model_index.json").is_file() or (snapshot / "config.json").is_file():
        return _of_cache(snapshot, model.variant)
    return _of_architecture(architectures.load(envs, model.architecture), model)


def _of_cache(snapshot: Path, variant: str | None) -> Structure:
    faults: list[str] = []
    index = _json(snapshot / "model_index.json", faults) if (snapshot / "model_index.json").exists() else {}
    parts = {
        name: told
        for name, told in index.items()
        if not name.startswith("_") and isinstance(told, list) and len(told) == 2 and told[1]
    }
    if not parts:
        config = _json(snapshot / "config.json", faults)
        kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
        return Structure(None, [_component(snapshot, "model", None, kind, None, faults)], None, "the cache", faults)
    scheduler = None
    components = []
    for name, (library, kind) in parts.items():
        folder = snapshot / name
        if name == "scheduler":
            file = next(
                (
                    each
                    for each in (folder / "scheduler_config.json", snapshot / "scheduler_config.json")
                    if each.exists()
                ),
                None,
            )
            settings = _json(file, faults) if file else {}
            scheduler = (kind, {key: value for key, value in settings.items() if not key.startswith("_")})
            continue
        # A repository with one model keeps it flat, beside the index.
        flat = not folder.is_dir() and (snapshot / "config.json").exists()
        components.append(_component(snapshot if flat else folder, name, library, kind, variant, faults))
    return Structure(index.get("_class_name"), components, scheduler, "the cache", faults)


def _component(
    folder: Path, name: str, library: str | None, kind: str | None, variant: str | None, faults: list[str]
) -> Component:
    if not folder.is_dir():
        faults.append(f"{name} is not in the cache")
        return Component(name, library, kind)
    files = sorted(folder.glob("*.safetensors"))
    chosen = [file for file in files if (f".{variant}." in file.name if variant else file.name.count(".") == 1)]
    count, size = 0, 0
    kinds: dict[str, int] = {}
    for file in chosen or files:
        try:
            tensors = weights.read_header(file)
        except (weights.WeightsError, OSError) as error:
            faults.append(f"{file.name} of {name} {error}")
            continue
        size += file.stat().st_size
        for tensor in tensors.values():
            count += tensor.elements
            kinds[tensor.dtype] = kinds.get(tensor.dtype, 0) + tensor.elements
    if not kinds:
        return Component(name, library, kind)
    dtype = max(kinds, key=lambda each: kinds[each])
    return Component(name, library, kind, count, DTYPES.get(dtype, dtype.lower()), size)


def _of_architecture(found: architectures.Architecture, model: ModelSpec) -> Structure:
    dtype = stand_ins.dtype_of(model)
    components = [
        Component(name, library, kind, count, DTYPES[dtype], count * _BYTES[dtype])
        for name, (library, kind) in found.classes.items()
        for count in (found.parameters[name],)
    ]
    components += [Component(name, "transformers", kind) for name, kind in found.tokenizers.items()]
    return Structure(found.pipeline, components, found.scheduler, "the architecture")


def _json(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        faults.append(f"{path.name} cannot be read")
        return {}
    return found
