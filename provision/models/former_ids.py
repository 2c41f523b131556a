"""Keeps links in the hub cache that let a renamed repository be loaded by its former ids."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from provision.config.models import cache_folder
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.models import ModelSpec

_MARK = "firstlight-aliases"  # a file in the repository's folder: the names of the links that firstlight has made


def missing(hub: Path, model: ModelSpec) -> list[str]:
    """Return the former ids of a model that have neither a link nor anything else in the cache.

    The list is empty if the model itself is not in the cache.
    """
    if not (hub / model.folder).is_dir():
        return []
    paths = {repo: hub / cache_folder(repo) for repo in model.former_repos}
    return [repo for repo, path in paths.items() if not (path.exists() or path.is_symlink())]


def can_be_made(hub: Path, model: ModelSpec) -> bool:
    """Return whether a link and its mark can be written; a cache that other users fill may be read-only."""
    return os.access(hub, os.W_OK | os.X_OK) and os.access(hub / model.folder, os.W_OK | os.X_OK)


def make(hub: Path, model: ModelSpec) -> list[str]:
    """Link every former id of a model's repository to its folder.

    The links are relative, since both ends are in one cache.

    Returns:
        Warnings for the user: a former id is taken by something that firstlight has not made, which stays; or the
        cache cannot be written.
    """
    folder = hub / model.folder
    missing_ids = missing(hub, model)
    if missing_ids and not can_be_made(hub, model):
        return [f"{hub} is read-only, so {model.repo} cannot be loaded as {', '.join(missing_ids)}"]
    for repo in missing_ids:
        name = cache_folder(repo)
        # The mark is written first: a kill in between may leave a mark without its link, but never an unmarked link.
        write_atomic(folder / _MARK, "\n".join(sorted({*_marked(folder), name})) + "\n")
        try:
            (hub / name).symlink_to(model.folder, target_is_directory=True)
        except FileExistsError:  # another process has made it
            continue
        except PermissionError:
            return [f"{hub} cannot store links, so {model.repo} cannot be loaded as {', '.join(missing_ids)}"]
    paths = {repo: hub / cache_folder(repo) for repo in model.former_repos}
    return [
        f"{path} was not made by firstlight and stays: from_pretrained({repo!r}) loads it"
        for repo, path in paths.items()
        if not leads_to(path, model.folder)
    ]


def owned(hub: Path, folder: str) -> list[Path]:
    """Return the links to a repository's folder that firstlight has made."""
    return [hub / name for name in _marked(hub / folder) if leads_to(hub / name, folder)]


def leads_to(path: Path, folder: str) -> bool:
    """Return whether a path is a link to the folder of this name beside it."""
    try:
        return str(path.readlink()) == folder
    except OSError:
        return False


def _marked(folder: Path) -> list[str]:
    """Return the names in the mark of a repository's folder; names that are not links of a hub cache are left out."""
    try:
        names = (folder / _MARK).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []
    return [name for name in names if name.startswith("models--") and "/" not in name]
