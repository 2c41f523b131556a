"""The hashes that the manifest does not name: told by a hub at the first pull, kept on the volume, and held to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from provision.fs.atomic import write_atomic
from provision.fs.file_lock import exclusive_lock

if TYPE_CHECKING:
    from collections.abc import Iterable

    from provision.config.models import ModelFile, ModelSpec
    from provision.core.layout import Root
    from provision.models.hub_client import ListedFile

SCHEMA = 1
_OFFICIAL = "official"


def apply(root: Root, model: ModelSpec) -> ModelSpec:
    """The model with what is on record of its files; what the manifest says goes before.

    A record that contradicts the manifest is none, and neither is one that is no hash or size.
    """
    kept = _read(root).get(_key(model), {})
    return model.model_copy(update={"files": [_with(file, kept.get(file.path, {})) for file in model.files]})


def _with(file: ModelFile, row: dict[str, Any]) -> ModelFile:
    said = file.model_dump(exclude_none=True)
    known = {name: row[name] for name in ("size", "sha256", "git_sha1") if row.get(name) is not None}
    if file.locked or any(said.get(name, value) != value for name, value in known.items()):
        return file
    try:
        return type(file).model_validate({**known, **said})
    except ValueError:
        return file


def source(root: Root, model: ModelSpec, path: str) -> str | None:
    """By whose word a file is pinned that the manifest does not pin."""
    told = _read(root).get(_key(model), {}).get(path, {}).get("from")
    return str(told) if told else None


def by_mirrors(root: Root, model: ModelSpec) -> dict[str, str]:
    """{path: whose word} of the files that are pinned by the word of somebody other than the official hub."""
    kept = _read(root).get(_key(model), {})
    return {path: str(row["from"]) for path, row in kept.items() if row.get("from") not in (None, _OFFICIAL)}


def keep(root: Root, model: ModelSpec, listed: Iterable[ListedFile], source: str) -> None:
    """Keep what a hub says of files that are not pinned yet; `source` is the hub's name.

    The official hub's word takes the place of a mirror's; no other word does.
    """
    with exclusive_lock(root.model_pins):
        every = _read(root)
        mine = dict(every.get(_key(model), {}))
        for each in listed:
            row = {"size": each.size, each.kind: each.blob, "from": source}
            if source == _OFFICIAL and mine.get(each.path, {}).get("from") != _OFFICIAL:
                mine[each.path] = row
            mine.setdefault(each.path, row)
        if mine and mine != every.get(_key(model)):
            _write(root, {**_document(root), "pins": {**every, _key(model): mine}})


def _write(root: Root, document: dict[str, Any]) -> None:
    text = json.dumps({**document, "schema": SCHEMA}, indent=1, sort_keys=True)
    write_atomic(root.model_pins, text + "\n")


def _key(model: ModelSpec) -> str:
    return f"{model.repo}@{model.revision}"


def _read(root: Root) -> dict[str, dict[str, dict[str, Any]]]:
    """What is on record; what is no table of tables is left out: a person may have edited it."""
    pins = _document(root).get("pins")
    if not isinstance(pins, dict):
        return {}
    tables = {model: rows for model, rows in pins.items() if isinstance(rows, dict)}
    return {model: {path: row for path, row in rows.items() if isinstance(row, dict)} for model, rows in tables.items()}


def _document(root: Root) -> dict[str, Any]:
    try:
        found = json.loads(root.model_pins.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
