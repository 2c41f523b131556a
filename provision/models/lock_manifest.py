"""Writes the sizes and hashes of a model's files into a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from provision.core.errors import FirstlightError, SpecError
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.models import ModelSpec
    from provision.models.hub_client import Hub


def lock(path: Path, name: str, model: ModelSpec, hub: Hub) -> int:
    """Add the sizes and hashes that the official hub lists to the files of one entry in a manifest.

    The files of the entry's extras (optional sets of files, NAME+EXTRA) are completed too. Everything else in the
    manifest stays as it is, including comments.

    Args:
        path: the path of the manifest.
        name: the name of the entry.
        model: the same entry as it was read, with its repository and revision.
        hub: the official hub.

    Returns:
        The number of files to which a size or hash was added.

    Raises:
        HubError: the hub is unavailable.
        SpecError: the manifest has no such entry.
        FirstlightError: the hub does not have a file, or lists another size or hash than the pinned one.
    """
    import tomlkit

    listing = hub.listing(model.repo, model.revision)
    document: Any = tomlkit.parse(path.read_text(encoding="utf-8"))
    if name not in document:
        raise SpecError(f"{path} has no entry {name!r}.")
    entry = document[name]
    completed = 0
    for row in [*entry["files"], *(row for extra in entry.get("extras", {}).values() for row in extra)]:
        listed = listing.get(str(row["path"]))
        if listed is None:
            raise FirstlightError(f"{hub.endpoint} has no file {row['path']} in {model.repo} at {model.revision}.")
        before = dict(row)
        for key, value in (("size", listed.size), (listed.kind, listed.blob)):
            if row.get(key, value) != value:
                raise FirstlightError(
                    f"{hub.endpoint} lists {row['path']} of {model.repo} with {key} {value}, but {path} pins "
                    f"{row[key]}. Nothing was written. Correct the manifest if the hub is right."
                )
            row[key] = value
        completed += dict(row) != before
    if completed:
        write_atomic(path, tomlkit.dumps(document), like=path.stat())
    return completed
