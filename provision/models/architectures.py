"""What a model is made of, as envs/architectures/NAME.json tells it: known without the model and without torch."""

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
    """One architecture.

    `pipeline`: diffusers' class of the whole, None for a model that stands alone. `classes`: {component: (library,
    class)}; `beside`: those of them that a pipeline does without, as a safety checker. `configs`: {component: its
    configuration}. `parameters`: {component: how many}. `tokenizers`: {component: class}. `processors`: {component:
    (class, settings)}. `scheduler`: its class, and its settings; None where there is none. `is_flat`: the repository
    keeps its one model at the top, not in a folder of the component's name. `description`: what the worker of stand-ins
    told of it when it was recorded; None where it must be asked.
    """

    name: str
    pipeline: str | None
    classes: dict[str, tuple[str, str]]
    configs: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    tokenizers: dict[str, str] = field(default_factory=dict)
    scheduler: tuple[str, dict[str, Any]] | None = None
    beside: frozenset[str] = frozenset()
    processors: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    is_flat: bool = False
    description: dict[str, Any] | None = None

    @property
    def request(self) -> dict[str, Any]:
        """Return the request for the worker that describes stand-ins."""
        return {"classes": self.classes, "configs": self.configs, "scheduler": self.scheduler}


def load(envs: Path, name: str) -> Architecture:
    """Read an architecture.

    Args:
        envs: the folder of environments, models and architectures.
        name: as a model of the manifest names it.

    Raises:
        SpecError: there is none of this name, or it cannot be read.
    """
    path = envs / "architectures" / f"{name}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        beside = _classes(found.get("beside", {}))
        classes = _classes(found["classes"]) | beside
        native = dict(found.get("native", {}))
        kind = native.pop("class", None)
        made = Architecture(
            name,
            found.get("pipeline"),
            classes,
            {part: found[part] for part in classes},
            {part: int(found["parameters"][part]) for part in classes},
            found.get("tokenizers", {}),
            (str(kind), {**found.get("scheduler", {}), **native}) if kind else None,
            frozenset(beside),
            {part: (str(kind), found[part]) for part, kind in found.get("processors", {}).items()},
            found.get("pipeline") is None or found.get("layout") == "flat",
        )
    except FileNotFoundError:
        raise SpecError(f"{path} is not there: nothing is known of the architecture {name!r}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{path} cannot be read as an architecture ({type(error).__name__}: {error}).") from None
    return _described(made, recorded(envs, name))


def recorded(envs: Path, name: str) -> Path:
    """Return the file that holds what the worker told of an architecture."""
    return envs / "architectures" / "recorded" / f"{name}.json"


def record(envs: Path, architecture: Architecture, description: Mapping[str, Any]) -> None:
    """Write what the worker told of an architecture, one tensor a line."""
    path = recorded(envs, architecture.name)
    text = json.dumps({"of": fingerprint(architecture), **description}, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def fingerprint(architecture: Architecture) -> str:
    """The hash of all that the worker's answer depends on, except for the versions of the packages."""
    return hashlib.sha256(json.dumps(architecture.request, sort_keys=True).encode()).hexdigest()


def _classes(told: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {part: (str(library), str(kind)) for part, (library, kind) in told.items()}


def _described(made: Architecture, path: Path) -> Architecture:
    """The architecture with its recorded description, where there is one, and it is of these settings."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told.pop("of") == fingerprint(made):
            return replace(made, description=told)
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    return made
