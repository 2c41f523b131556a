"""The models that can be asked for: envs/models.toml, what a user adds to it, and the names by which they are found.

A model's name is NAME[@VARIANT][+EXTRA...]. NAME is an entry's, a former name of it, or the id of its repository. NAME
alone is the entry that `from_pretrained(REPO)` loads; where a repository has variants alone, the first of them.
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
    """Models by the names of their entries, NAME or NAME@VARIANT."""

    def __init__(self, models: dict[str, ModelSpec], added: Collection[str] = ()) -> None:
        """Take the entries, and the names of those that are in the user's own file."""
        self.models = models
        self.added = added

    def name(self, asked: str) -> str:
        """Return the one name of what is asked for: the entry's own, and each extra that adds files, once.

        Args:
            asked: NAME[@VARIANT][+EXTRA...], as the module says.

        Raises:
            SpecError: there is no such model, variant or extra.
        """
        head, *extras = asked.split("+")
        entry = self._entry(head)
        known = self.models[entry].extras
        for extra in extras:
            toml.choose(extra, list(known), f"extra of {entry}")
        return "+".join([entry, *(extra for extra in dict.fromkeys(extras) if known[extra])])

    def pick(self, asked: str) -> ModelSpec:
        """Return one entry, with the extras that are asked for among its files.

        Every former id of the repository is among its aliases, whichever entry names it.

        Args:
            asked: as for `name`.

        Raises:
            SpecError: there is no such model, variant or extra.
        """
        entry, *extras = self.name(asked).split("+")
        model = self.models[entry]
        files = [*model.files, *(file for extra in extras for file in model.extras[extra])]
        former = [repo for each in self.models.values() if each.repo == model.repo for repo in each.former_repos]
        return model.model_copy(update={"files": files, "extras": {}, "aliases": list(dict.fromkeys(former))})

    def revisions(self, repo: str) -> set[str]:
        """Every commit of a repository that an entry pins."""
        return {model.revision for model in self.models.values() if model.repo == repo}

    def every(self) -> Iterable[ModelSpec]:
        """Every entry with all of its extras."""
        return [self.pick("+".join([name, *model.extras])) for name, model in self.models.items()]

    def _entry(self, asked: str) -> str:
        if asked in self.models:
            return asked
        base, at, variant = asked.partition("@")
        stems = {
            _stem(name) for name, model in self.models.items() if base in {_stem(name), model.repo, *model.aliases}
        }
        alike = [name for name in self.models if _stem(name) in stems]
        if not alike:
            return toml.choose(asked, list(self.models), "model")
        if at:
            found = [name for name in alike if self.models[name].variant == variant]
            known = [each for name in alike if (each := self.models[name].variant)]
            return found[0] if found else toml.choose(variant, known, f"variant of {base}")
        return next((name for name in alike if "@" not in name), alike[0])


def _stem(name: str) -> str:
    return name.partition("@")[0]


def load(shipped: Path, added: str | None = None) -> Manifest:
    """The shipped manifest with what a user adds: an entry of the same name takes the shipped one's place.

    Args:
        shipped: envs/models.toml.
        added: another file of the same form.

    Raises:
        SpecError: a file cannot be read, a key is wrong, or a name is none.
    """
    models = _read(shipped)
    if added is None:
        return Manifest(models)
    own = _read(Path(os.path.expanduser(added)))  # noqa: PTH111 (no home: it stays as it is, and is not found)
    return Manifest(models | own, own.keys())


def _read(path: Path) -> dict[str, ModelSpec]:
    found = toml.load_tables(path, models_config.ModelSpec)
    for name, model in found.items():
        matched = _ENTRY.fullmatch(name)
        if not matched:
            raise SpecError(f"{path}, key {name}: a name is letters, digits, . _ and -, or NAME@VARIANT. Rename it.")
        if matched["variant"] and matched["variant"] != model.variant:
            raise SpecError(f'{path}, key {name}: this name takes variant = "{matched["variant"]}". Add it.')
    return found
