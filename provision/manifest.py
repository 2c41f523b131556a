"""The models that can be asked for: envs/models.toml, what a user adds to it, and the extras of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from provision import spec
from provision.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from provision.spec import ModelSpec


class Manifest:
    """Models by name; NAME+EXTRA is the model with the files of an extra as well."""

    def __init__(self, models: dict[str, ModelSpec]) -> None:
        """Take the entries."""
        self.models = models

    def pick(self, asked: str) -> ModelSpec:
        """One entry, with the extras that were asked for among its files.

        Args:
            asked: NAME, or NAME+EXTRA, or more extras.

        Raises:
            SpecError: there is no such model or extra.
        """
        name, *extras = asked.split("+")
        model = self.models[spec.choose(name, list(self.models), "model")]
        for extra in extras:
            spec.choose(extra, list(model.extras), f"extra of {name}")
        files = [*model.files, *(file for extra in dict.fromkeys(extras) for file in model.extras[extra])]
        return model.model_copy(update={"files": files, "extras": {}})

    def revisions(self, repo: str) -> set[str]:
        """Every commit of a repository that an entry pins."""
        return {model.revision for model in self.models.values() if model.repo == repo}

    def every(self) -> Iterable[ModelSpec]:
        """Every entry with all of its extras."""
        return [self.pick("+".join([name, *model.extras])) for name, model in self.models.items()]


def load(shipped: Path, added: str | None = None) -> Manifest:
    """The shipped manifest with what a user adds: an entry of the same name takes the shipped one's place.

    Args:
        shipped: envs/models.toml.
        added: another file of the same form.

    Raises:
        SpecError: a file cannot be read, a key is wrong, or a name holds a plus.
    """
    models = _read(shipped)
    if added is not None:
        models |= _read(Path(os.path.expanduser(added)))  # noqa: PTH111 (no home: it stays as it is, and is not found)
    return Manifest(models)


def _read(path: Path) -> dict[str, ModelSpec]:
    found = spec.load_tables(path, spec.ModelSpec)
    for name in found:
        if "+" in name:
            raise SpecError(f"{path}, key {name}: a plus stands before an extra. Give another name.")
    return found
