"""The hashes that the manifest does not name: told by a hub at the first pull, kept on the volume, and held to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from provision.hub import Listed
    from provision.paths import Root
    from provision.spec import ModelSpec

SCHEMA = 1


def apply(root: Root, model: ModelSpec) -> ModelSpec:
    """The model with what is on record of its files; what the manifest says goes before."""
    kept = _read(root).get(_key(model), {})
    files = []
    for file in model.files:
        row = {} if file.locked else kept.get(file.path, {})
        known = {name: row[name] for name in ("size", "sha256", "git_sha1") if row.get(name) is not None}
        files.append(file.model_copy(update=known) if known else file)
    return model.model_copy(update={"files": files})


def source(root: Root, model: ModelSpec, path: str) -> str | None:
    """By whose word a file is pinned that the manifest does not pin."""
    told = _read(root).get(_key(model), {}).get(path, {}).get("from")
    return str(told) if told else None


def keep(root: Root, model: ModelSpec, listed: Iterable[Listed], source: str) -> None:
    """Keep what a hub says of files that are not pinned yet; `source` is the hub's name."""
    every = _read(root)
    mine = dict(every.get(_key(model), {}))
    for each in listed:
        mine.setdefault(each.path, {"size": each.size, each.kind: each.blob, "from": source})
    if mine and mine != every.get(_key(model)):
        text = json.dumps({"schema": SCHEMA, "pins": {**every, _key(model): mine}}, indent=1, sort_keys=True)
        write_atomic(root.model_pins, text + "\n")


def _key(model: ModelSpec) -> str:
    return f"{model.repo}@{model.revision}"


def _read(root: Root) -> dict[str, dict[str, dict[str, Any]]]:
    try:
        found = json.loads(root.model_pins.read_text(encoding="utf-8"))
        pins: dict[str, dict[str, dict[str, Any]]] = found["pins"]
        return pins if isinstance(pins, dict) else {}  # type: ignore[redundant-expr]  # a person may have edited it
    except (OSError, ValueError, KeyError, TypeError):
        return {}
