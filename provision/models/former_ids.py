"""Makes links in the hub cache, so that a renamed repository can be loaded by its former ids too.

Such a link leads from the folder name of a former id to the folder of the repository. A mark, a file in that folder,
lists the links that firstlight has made.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from provision.config.models import cache_folder
from provision.fs.atomic import write_atomic
from provision.models.main_ref import read_text

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.models import ModelSpec

_MARK = "firstlight-aliases"  # the name of the mark


def missing(hub: Path, model: ModelSpec) -> list[str]:
    """Return the former ids of a model under whose folder names nothing is in the hub cache.

    The list is empty if the repository of the model is not in the cache.

    Args:
        hub: the hub cache.
        model: the entry of the manifest.
    """
    if not (hub / model.folder).is_dir():
        return []
    paths = {repo: hub / cache_folder(repo) for repo in model.former_repos}
    return [repo for repo, path in paths.items() if not (path.exists() or path.is_symlink())]


def can_be_made(hub: Path, model: ModelSpec) -> bool:
    """Return whether this user can write to the hub cache and to the model's folder, as `make` must."""
    return os.access(hub, os.W_OK | os.X_OK) and os.access(hub / model.folder, os.W_OK | os.X_OK)


def make(hub: Path, model: ModelSpec) -> list[str]:
    """Make the missing links from the former ids of a model's repository to its folder.

    The links are relative, since both ends are in the same cache.

    Args:
        hub: the hub cache.
        model: the entry of the manifest.

    Returns:
        Warnings for the user: the cache cannot be written, or the folder name of a former id is used by something that
        firstlight has not made, which is left as it is.
    """
    folder = hub / model.folder
    missing_ids = missing(hub, model)
    if missing_ids and not can_be_made(hub, model):
        return [f"{hub} is read-only, so {model.repo} cannot be loaded as {', '.join(missing_ids)} (former id)"]
    for repo in missing_ids:
        name = cache_folder(repo)
        # The mark is written first: a kill between the two writes may leave a name in the mark without its link, but
        # never a link that the mark does not list.
        write_atomic(folder / _MARK, "\n".join(sorted({*_marked(folder), name})) + "\n")
        try:
            (hub / name).symlink_to(model.folder, target_is_directory=True)
        except FileExistsError:  # another process has made the link
            continue
        except PermissionError:
            return [
                f"{hub} cannot store links, so {model.repo} cannot be loaded as {', '.join(missing_ids)} (former id)"
            ]
    paths = {repo: hub / cache_folder(repo) for repo in model.former_repos}
    return [
        f"{path} was not made by firstlight and stays: from_pretrained({repo!r}) loads it, not {model.repo}"
        for repo, path in paths.items()
        if not leads_to(path, model.folder)
    ]


def owned(hub: Path, folder: str) -> list[Path]:
    """Return the paths of the links to a repository's folder that firstlight has made.

    Args:
        hub: the hub cache.
        folder: the name of the repository's folder, such as "models--owner--name".
    """
    return [hub / name for name in _marked(hub / folder) if leads_to(hub / name, folder)]


def leads_to(path: Path, folder: str) -> bool:
    """Return whether a path is a relative link to the folder with this name in the same parent folder."""
    try:
        return str(path.readlink()) == folder
    except OSError:
        return False


def _marked(folder: Path) -> list[str]:
    """Return the names of links in the mark of a repository's folder.

    Names that cannot be folders of a hub cache are left out, since the file may have been edited.
    """
    return [name for name in read_text(folder / _MARK).split() if name.startswith("models--") and "/" not in name]
