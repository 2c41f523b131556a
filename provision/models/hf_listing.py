"""Calls huggingface_hub for a complete snapshot, so that huggingface_hub stores its own listing of that snapshot.

A program can then load the snapshot offline. The listing is a file in `trees/` of the repository's folder.
"""

from __future__ import annotations

import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from provision.fs import durable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def load() -> None:
    """Import huggingface_hub, in a thread while files are downloaded, because the import takes 0.2 s."""
    from huggingface_hub import snapshot_download  # noqa: F401


def list_snapshot(repo: str, revision: str, paths: Iterable[str], cache: Path, endpoint: str) -> bool:
    """Call `snapshot_download` for a snapshot whose files are all present, so that it only stores its listing.

    The call has no token. huggingface_hub follows the link to a listing's next page to any host, and would send the
    token there.

    Args:
        repo: the id of the repository.
        revision: the commit.
        paths: the paths of the files in the snapshot.
        cache: the hub cache.
        endpoint: the URL of the hub that lists the files.

    Returns:
        True after success; False if huggingface_hub has raised an error, such as for an invalid response.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    constants.HF_HUB_DISABLE_XET = True  # the Xet protocol downloads from its own hosts, not from the mirror
    try:
        snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            endpoint=endpoint,
            token=False,
            allow_patterns=[_escaped(path) for path in paths],
        )
    except Exception:  # an invalid response of a hub may raise any error in huggingface_hub
        return False
    return True


def open_listings(repo: Path) -> None:
    """Add to the listings of a repository the permissions that the umask gives to new files.

    huggingface_hub makes a listing readable for its owner only, so other users could not use a shared cache.
    """
    mode = durable.new_file_mode()
    for tree in (repo / "trees").glob("*.json"):
        with suppress(OSError):  # only its owner can change the mode of a file
            present = stat.S_IMODE(tree.stat().st_mode)
            if present | mode != present:
                tree.chmod(present | mode)


def _escaped(path: str) -> str:
    """Return a pattern for `allow_patterns` that matches only this path."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)
