"""Runs huggingface_hub once on a complete snapshot, so that it stores its own listing of the snapshot."""

from __future__ import annotations

import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from provision.fs import durable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def load() -> None:
    """Import huggingface_hub; the import takes 0.2 seconds, which can pass while files are downloaded."""
    from huggingface_hub import snapshot_download  # noqa: F401


def list_snapshot(repo: str, revision: str, paths: Iterable[str], cache: Path, endpoint: str) -> bool:
    """Let huggingface_hub store its listing of a snapshot whose files are all present; it downloads none of them.

    It gets no token, because it follows a listing's next page to any host and would send the token there.

    Args:
        repo: the id of the repository.
        revision: the commit.
        paths: the files of the snapshot.
        cache: the hub cache.
        endpoint: the URL of the hub.

    Returns:
        True after success; False if the hub gave an answer with which huggingface_hub cannot work.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    constants.HF_HUB_DISABLE_XET = True  # Xet downloads from its own data hosts, not from the mirror
    try:
        snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            endpoint=endpoint,
            token=False,
            allow_patterns=[_escaped(path) for path in paths],
        )
    except Exception:  # a hub's answer may raise any error in the client
        return False
    return True


def open_listings(repo: Path) -> None:
    """Give the listings of a repository the mode that the umask sets.

    huggingface_hub writes them readable for their owner only, so other users could not use a shared cache.
    """
    mode = durable.new_file_mode()
    for tree in (repo / "trees").glob("*.json"):
        with suppress(OSError):  # only its owner can change the mode of a file
            present = stat.S_IMODE(tree.stat().st_mode)
            if present | mode != present:
                tree.chmod(present | mode)


def _escaped(path: str) -> str:
    """Return a path as a pattern that matches this path only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)
