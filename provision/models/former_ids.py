"""Links in the hub cache that let a repository be loaded by its former ids, such as the one before it moved."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from provision.config.models import cache_folder
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.models import ModelSpec

_MARK = "firstlight-aliases"  # beside refs: the folders' names of the links that we have made


def missing(hub: Path, model: ModelSpec) -> list[str]:
    """Return the former ids for which neither a link nor anything else is there, of a model that is."""
    if not (hub / model.folder).is_dir():
        return []
    places = {repo: hub / cache_folder(repo) for repo in model.former_repos}
    return [repo for repo, place in places.items() if not (place.exists() or place.is_symlink())]


def can_be_made(hub: Path, model: ModelSpec) -> bool:
    """Return whether a link and its mark can be written: a cache that others fill may be read-only."""
    return os.access(hub, os.W_OK | os.X_OK) and os.access(hub / model.folder, os.W_OK | os.X_OK)


def make(hub: Path, model: ModelSpec) -> list[str]:
    """Link every former id of a model's repository to its folder, by a relative link: both lie in one cache.

    Returns:
        What its owner should know: a former id is taken by something that is not ours, which stays; or no link can be
        written.
    """
    folder = hub / model.folder
    lost = missing(hub, model)
    if lost and not can_be_made(hub, model):
        return [f"{hub} cannot be written, so {model.repo} is not found as {', '.join(lost)}"]
    for repo in lost:
        name = cache_folder(repo)
        # The mark first: killed between the two, we know of a link that is not there, never the other way round.
        write_atomic(folder / _MARK, "\n".join(sorted({*_marked(folder), name})) + "\n")
        with suppress(FileExistsError):  # another process was quicker
            (hub / name).symlink_to(model.folder, target_is_directory=True)
    places = {repo: hub / cache_folder(repo) for repo in model.former_repos}
    return [
        f"{place} is not ours and stays: from_pretrained({repo!r}) loads that"
        for repo, place in places.items()
        if not leads_to(place, model.folder)
    ]


def owned(hub: Path, folder: str) -> list[Path]:
    """Return the links to a repository's folder that we have made."""
    return [hub / name for name in _marked(hub / folder) if leads_to(hub / name, folder)]


def leads_to(place: Path, folder: str) -> bool:
    """Return whether a path is a link to a folder beside it."""
    try:
        return str(place.readlink()) == folder
    except OSError:
        return False


def _marked(folder: Path) -> list[str]:
    try:
        names = (folder / _MARK).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []
    return [name for name in names if name.startswith("models--") and "/" not in name]
