"""Records in the root the sizes and hashes of files that the manifest does not pin.

The first pull takes them from a hub's listing. The record is the file `root.model_pins`:
{"schema", "pins": {REPOSITORY@REVISION: {path: {"size", "sha256" or "git_sha1", "from": name of the hub}}}}.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from provision.fs import records
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
    """Return an entry of the manifest with the recorded sizes and hashes added to its files.

    The record of a file is ignored if the manifest pins its hash, if it contradicts the manifest, or if it is invalid.
    """
    rows = _read(root).get(_key(model), {})
    return model.model_copy(update={"files": [_with_record(file, rows.get(file.path, {})) for file in model.files]})


def _with_record(file: ModelFile, row: dict[str, Any]) -> ModelFile:
    pinned = file.model_dump(exclude_none=True)
    recorded = {name: row[name] for name in ("size", "sha256", "git_sha1") if row.get(name) is not None}
    if file.locked or any(pinned.get(name, value) != value for name, value in recorded.items()):
        return file
    try:
        return type(file).model_validate({**recorded, **pinned})
    except ValueError:
        return file


def source(root: Root, model: ModelSpec, path: str) -> str | None:
    """Return the name of the hub whose listing has supplied the recorded hash of a file; None without a record."""
    hub = _read(root).get(_key(model), {}).get(path, {}).get("from")
    return str(hub) if hub else None


def by_mirrors(root: Root, model: ModelSpec) -> dict[str, str]:
    """Return {path: name of the mirror} of the files whose recorded hash comes from a mirror's listing."""
    rows = _read(root).get(_key(model), {})
    return {path: str(row["from"]) for path, row in rows.items() if row.get("from") not in (None, _OFFICIAL)}


def keep(root: Root, model: ModelSpec, listed: Iterable[ListedFile], source: str) -> None:
    """Record the sizes and hashes that a hub lists for files without a recorded hash.

    A hash of the official hub replaces the recorded hash of a mirror. No other recorded hash is replaced.

    Args:
        root: the root that has the record.
        model: the entry of the manifest.
        listed: the rows of the hub's listing.
        source: the name of the hub; "official" for the official hub.
    """
    with exclusive_lock(root.model_pins):
        pins = _read(root)
        rows = dict(pins.get(_key(model), {}))
        for file in listed:
            row = {"size": file.size, file.kind: file.blob, "from": source}
            if source == _OFFICIAL and rows.get(file.path, {}).get("from") != _OFFICIAL:
                rows[file.path] = row
            rows.setdefault(file.path, row)
        if rows and rows != pins.get(_key(model)):
            _write(root, {**_document(root), "pins": {**pins, _key(model): rows}})


def _write(root: Root, document: dict[str, Any]) -> None:
    text = json.dumps({**document, "schema": SCHEMA}, indent=1, sort_keys=True)
    write_atomic(root.model_pins, text + "\n")


def _key(model: ModelSpec) -> str:
    return f"{model.repo}@{model.revision}"


def _read(root: Root) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the recorded pins: {REPOSITORY@REVISION: {path: row}}.

    Values of a wrong type are left out, because the user may have edited the file.
    """
    pins = _document(root).get("pins")
    if not isinstance(pins, dict):
        return {}
    tables = {model: rows for model, rows in pins.items() if isinstance(rows, dict)}
    return {model: {path: row for path, row in rows.items() if isinstance(row, dict)} for model, rows in tables.items()}


def _document(root: Root) -> dict[str, Any]:
    try:
        return records.read_state(root.model_pins)
    except (OSError, ValueError):
        return {}
