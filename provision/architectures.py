"""What a model is made of, as envs/architectures/NAME.json tells it: known without the model and without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from provision.errors import SpecError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    `pipeline`: diffusers' class of the whole, None for a model that stands alone. `classes`: {component: (library,
    class)}. `configs`: {component: its configuration}. `parameters`: {component: how many}. `tokenizers`: {component:
    class}. `scheduler`: its class, and its settings; None where there is none.
    """

    name: str
    pipeline: str | None
    classes: dict[str, tuple[str, str]]
    configs: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    tokenizers: dict[str, str] = field(default_factory=dict)
    scheduler: tuple[str, dict[str, Any]] | None = None


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
        classes = {part: (str(library), str(kind)) for part, (library, kind) in found["classes"].items()}
        native = dict(found.get("native", {}))
        kind = native.pop("class", None)
        return Architecture(
            name,
            found.get("pipeline"),
            classes,
            {part: found[part] for part in classes},
            {part: int(found["parameters"][part]) for part in classes},
            found.get("tokenizers", {}),
            (str(kind), {**found.get("scheduler", {}), **native}) if kind else None,
        )
    except FileNotFoundError:
        raise SpecError(f"{path} is not there: nothing is known of the architecture {name!r}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{path} cannot be read as an architecture ({type(error).__name__}: {error}).") from None
