"""Reads envs/architectures/NAME.json, which describes the components of a model without its files and without torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from provision.core.errors import SpecError
from provision.fs import records

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Architecture:
    """Describe the components of all models with the same architecture, such as "sd15".

    `name`: the name of the architecture in the manifest.
    `pipeline`: the name of the pipeline's class in diffusers; None for a model that is loaded without a pipeline.
    `classes`: {component with weights: (library, name of its class)}.
    `configs`: {component with weights: its configuration}.
    `parameters`: {component with weights: number of parameters}.
    `tokenizers`: {component: name of its class in transformers}.
    `scheduler`: (name of its class, settings); None if the model has no scheduler.
    `optional`: the components of `classes` that may be absent from a pipeline, such as a safety checker.
    `processors`: {component: (name of its class in transformers, settings)}.
    `is_flat`: the repository keeps the files of its only model at the top, not in a folder named after the component.
    `description`: the recorded output of describe_architecture.py, which lists all tensors; None if nothing valid is
        recorded, so that the script must be run.
    """

    name: str
    pipeline: str | None
    classes: dict[str, tuple[str, str]]
    configs: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    tokenizers: dict[str, str] = field(default_factory=dict)
    scheduler: tuple[str, dict[str, Any]] | None = None
    optional: frozenset[str] = frozenset()
    processors: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    is_flat: bool = False
    description: dict[str, Any] | None = None

    @property
    def request(self) -> dict[str, Any]:
        """Return the input of describe_architecture.py: the classes, configurations and scheduler to describe."""
        return {"classes": self.classes, "configs": self.configs, "scheduler": self.scheduler}


def load(envs: Path, name: str) -> Architecture:
    """Return an architecture from its file, with its description if a valid one is recorded.

    Args:
        envs: the folder `envs`, which has the subfolder `architectures`.
        name: the name of the architecture in the manifest.

    Raises:
        SpecError: the file is missing, cannot be read or is not valid.
    """
    path = envs / "architectures" / f"{name}.json"
    try:
        content: Any = records.read_json(path)
        optional = _classes(content.get("beside", {}))
        classes = _classes(content["classes"]) | optional
        native = dict(content.get("native", {}))
        scheduler_class = native.pop("class", None)
        architecture = Architecture(
            name,
            content.get("pipeline"),
            classes,
            {component: content[component] for component in classes},
            {component: int(content["parameters"][component]) for component in classes},
            content.get("tokenizers", {}),
            (str(scheduler_class), {**content.get("scheduler", {}), **native}) if scheduler_class else None,
            frozenset(optional),
            {component: (str(kind), content[component]) for component, kind in content.get("processors", {}).items()},
            content.get("pipeline") is None or content.get("layout") == "flat",
        )
    except FileNotFoundError:
        raise SpecError(f"{path} does not exist: the architecture {name!r} is unknown.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{path} is not a valid architecture ({type(error).__name__}: {error}).") from None
    return _with_description(architecture, recorded_path(envs, name))


def recorded_path(envs: Path, name: str) -> Path:
    """Return the path of the file with the recorded output of describe_architecture.py; it may be missing."""
    return envs / "architectures" / "recorded" / f"{name}.json"


def record(envs: Path, architecture: Architecture, description: Mapping[str, Any]) -> None:
    """Record the output of describe_architecture.py in the file at `recorded_path`, with one tensor per line.

    Args:
        envs: the folder `envs`.
        architecture: the described architecture.
        description: the output of the script.
    """
    path = recorded_path(envs, architecture.name)
    text = json.dumps({"of": fingerprint(architecture), **description}, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def fingerprint(architecture: Architecture) -> str:
    """Return the sha256 of the input of describe_architecture.py, in hex.

    The versions of diffusers and transformers change the output as well, but are not part of the hash.
    """
    return hashlib.sha256(json.dumps(architecture.request, sort_keys=True).encode()).hexdigest()


def _classes(rows: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {component: (str(library), str(kind)) for component, (library, kind) in rows.items()}


def _with_description(architecture: Architecture, path: Path) -> Architecture:
    """Return the architecture with its recorded description.

    The architecture is returned unchanged if `path` has no valid record, or a record for another input of the script.
    """
    try:
        description: Any = records.read_json(path)
        if description.pop("of") == fingerprint(architecture):
            return replace(architecture, description=description)
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    return architecture
