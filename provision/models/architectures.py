"""Reads envs/architectures/NAME.json: the components of a model, known without its files and without torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Architecture:
    """Describe the components of a kind of model.

    `pipeline`: the class of the pipeline in diffusers; None for a model that is loaded without a pipeline.
    `classes`: {component: (library, class)}.
    `configs`: {component: its configuration}.
    `parameters`: {component: number of parameters}.
    `tokenizers`: {component: class}.
    `scheduler`: (class, settings); None if the model has no scheduler.
    `optional`: the components of `classes` that a pipeline can be loaded without, such as a safety checker.
    `processors`: {component: (class, settings)}.
    `is_flat`: the repository keeps the files of its only model at the top, not in a folder named after the component.
    `description`: the recorded answer of the worker (describe_architecture.py); None if the worker must be run.
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
        """Return the JSON input of describe_architecture.py: the classes, configurations and scheduler to describe."""
        return {"classes": self.classes, "configs": self.configs, "scheduler": self.scheduler}


def load(envs: Path, name: str) -> Architecture:
    """Read an architecture.

    Args:
        envs: the folder of environments, models and architectures.
        name: the name of the architecture in the manifest.

    Raises:
        SpecError: the file is missing or cannot be read.
    """
    path = envs / "architectures" / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
    """Return the path of the file that holds the worker's description of an architecture."""
    return envs / "architectures" / "recorded" / f"{name}.json"


def record(envs: Path, architecture: Architecture, description: Mapping[str, Any]) -> None:
    """Write the worker's description of an architecture to its file, with one tensor per line."""
    path = recorded_path(envs, architecture.name)
    text = json.dumps({"of": fingerprint(architecture), **description}, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def fingerprint(architecture: Architecture) -> str:
    """Return the hash of everything that determines the worker's description.

    The versions of the packages are not part of it.
    """
    return hashlib.sha256(json.dumps(architecture.request, sort_keys=True).encode()).hexdigest()


def _classes(rows: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {component: (str(library), str(kind)) for component, (library, kind) in rows.items()}


def _with_description(architecture: Architecture, path: Path) -> Architecture:
    """Return the architecture with its recorded description.

    It is returned unchanged if nothing is recorded, or if the record belongs to other settings.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description.pop("of") == fingerprint(architecture):
            return replace(architecture, description=description)
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    return architecture
