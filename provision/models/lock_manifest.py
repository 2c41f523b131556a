"""Writes the pins of a model into a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from provision.core.errors import FirstlightError, SpecError
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.models import ModelSpec
    from provision.models.hub_client import Hub


def lock(path: Path, name: str, model: ModelSpec, hub: Hub) -> int:
    """Write into a manifest what the official hub says of files that are not pinned there; all else stays as it is.

    Args:
        path: the manifest that has the entry.
        name: the model's.
        model: the entry with its extras' files.
        hub: the official one.

    Returns:
        How many files were completed.

    Raises:
        HubError: it does not answer, or does not have a file.
        FirstlightError: it lists other content than what is pinned already.
    """
    import tomlkit

    listing = hub.listing(model.repo, model.revision)
    document: Any = tomlkit.parse(path.read_text(encoding="utf-8"))
    if name not in document:
        raise SpecError(f"{path} has no entry {name!r}.")
    entry = document[name]
    count = 0
    for row in [*entry["files"], *(row for extra in entry.get("extras", {}).values() for row in extra)]:
        listed = listing.get(str(row["path"]))
        if listed is None:
            raise FirstlightError(f"{hub.endpoint} has no {row['path']} in {model.repo} at {model.revision}.")
        before = dict(row)
        for key, told in (("size", listed.size), (listed.kind, listed.blob)):
            if row.get(key, told) != told:
                raise FirstlightError(
                    f"{hub.endpoint} lists {row['path']} of {model.repo} with {key} {told}, {path} pins {row[key]}. "
                    "Nothing was written: find out which of the two is right."
                )
            row[key] = told
        count += dict(row) != before
    if count:
        write_atomic(path, tomlkit.dumps(document), like=path.stat())
    return count
