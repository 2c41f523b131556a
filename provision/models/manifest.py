"""Reads the manifest (envs/models.toml and the user's own manifest), and finds a model in it by name.

The name of a model is NAME[@VARIANT][+EXTRA...]. NAME is the name of an entry, an alias (a former name), or the id of
its repository. VARIANT is a set of weights, such as fp16. EXTRA is an optional set of files. NAME without a variant is
the entry that `from_pretrained(REPO)` loads. If all entries of a repository have variants, it is the first of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from provision.config import models as models_config
from provision.config import toml
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from provision.config.models import ModelSpec

_ENTRY = re.compile(r"[A-Za-z0-9][\w.-]*(@(?P<variant>[\w-]+))?")


class Manifest:
    """Holds the known models: {name of the entry: entry} in `models`; the name is NAME or NAME@VARIANT."""

    def __init__(self, models: dict[str, ModelSpec], added: Collection[str] = ()) -> None:
        """Store the entries, and in `added` the names of the entries that are in the user's own manifest."""
        self.models = models
        self.added = added

    def name(self, requested: str) -> str:
        """Return the canonical name of a model: the name of its entry, and "+EXTRA" once for each extra with files.

        Args:
            requested: NAME[@VARIANT][+EXTRA...], as in the module's docstring.

        Raises:
            SpecError: there is no such model, variant or extra.
        """
        base, *extras = requested.split("+")
        entry = self._entry(base)
        entry_extras = self.models[entry].extras
        for extra in extras:
            toml.choose(extra, list(entry_extras), f"extra of {entry}")
        return "+".join([entry, *(extra for extra in dict.fromkeys(extras) if entry_extras[extra])])

    def pick(self, requested: str) -> ModelSpec:
        """Return the entry of a model, with the files of the requested extras added to its files.

        Its aliases are all former ids of its repository, also those in other entries of the same repository.

        Args:
            requested: as for `name`.

        Raises:
            SpecError: there is no such model, variant or extra.
        """
        entry, *extras = self.name(requested).split("+")
        model = self.models[entry]
        files = [*model.files, *(file for extra in extras for file in model.extras[extra])]
        former_repos = [
            repo for other in self.models.values() if other.repo == model.repo for repo in other.former_repos
        ]
        return model.model_copy(update={"files": files, "extras": {}, "aliases": list(dict.fromkeys(former_repos))})

    def revisions(self, repo: str) -> set[str]:
        """Return the commits of a repository that the entries of the manifest pin."""
        return {model.revision for model in self.models.values() if model.repo == repo}

    def with_all_extras(self) -> Iterable[ModelSpec]:
        """Return every entry with the files of all its extras."""
        return [self.pick("+".join([name, *model.extras])) for name, model in self.models.items()]

    def _entry(self, requested: str) -> str:
        if requested in self.models:
            return requested
        base, separator, variant = requested.partition("@")
        stems = {
            _stem(name) for name, model in self.models.items() if base in {_stem(name), model.repo, *model.aliases}
        }
        candidates = [name for name in self.models if _stem(name) in stems]
        if not candidates:
            return toml.choose(requested, list(self.models), "model")
        if separator:
            matches = [name for name in candidates if self.models[name].variant == variant]
            variants = [candidate_variant for name in candidates if (candidate_variant := self.models[name].variant)]
            return matches[0] if matches else toml.choose(variant, variants, f"variant of {base}")
        return next((name for name in candidates if "@" not in name), candidates[0])


def _stem(name: str) -> str:
    return name.partition("@")[0]


def load(shipped: Path, added: str | None = None) -> Manifest:
    """Return the manifest from the file of firstlight and from the user's own file.

    If both files have an entry with the same name, the user's entry is used.

    Args:
        shipped: the path of envs/models.toml.
        added: the path of the user's manifest, which may begin with ~; None if there is none.

    Raises:
        SpecError: a file cannot be read, a key is wrong, or a name is invalid.
    """
    models = _read(shipped)
    if added is None:
        return Manifest(models)
    own = _read(Path(os.path.expanduser(added)))  # noqa: PTH111 (without a home, ~ stays in the path)
    return Manifest(models | own, own.keys())


def _read(path: Path) -> dict[str, ModelSpec]:
    models = toml.load_tables(path, models_config.ModelSpec)
    for name, model in models.items():
        match = _ENTRY.fullmatch(name)
        if not match:
            raise SpecError(
                f"{path}, key {name}: the name of an entry is NAME or NAME@VARIANT, of letters, digits, . _ and -. "
                "Rename the entry."
            )
        if match["variant"] and match["variant"] != model.variant:
            raise SpecError(
                f'{path}, key {name}: an entry with this name requires the line variant = "{match["variant"]}". Add it.'
            )
    return models
