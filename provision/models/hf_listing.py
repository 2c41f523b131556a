"""What is left to the hub's own client: its listing of a snapshot, beside the files that are here already."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_FOR_ALL = 0o044


def load() -> None:
    """Import it: it takes a fifth of a second, which may pass while files arrive."""
    from huggingface_hub import snapshot_download  # noqa: F401


def list_snapshot(repo: str, revision: str, paths: Iterable[str], cache: Path, endpoint: str) -> bool:
    """Let it see that all files of a snapshot are here: it keeps its listing, and asks for none of them.

    It gets no token, as it would follow a listing's next page to any host with it. Returns whether it could.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    constants.HF_HUB_DISABLE_XET = True  # it would ask its own data hosts, past the mirror
    try:
        snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            endpoint=endpoint,
            token=False,
            allow_patterns=[_literally(path) for path in paths],
        )
    except Exception:  # whatever this hub's answers do to the client
        return False
    return True


def open_listings(repo: Path) -> None:
    """Let everybody read its listings: it writes them for their owner, and nobody else could use a shared cache."""
    for tree in (repo / "trees").glob("*.json"):
        with suppress(OSError):  # another user's is that user's to open
            if tree.stat().st_mode & _FOR_ALL != _FOR_ALL:
                tree.chmod(0o644)


def _literally(path: str) -> str:
    """A path as a pattern that means itself."""
    return "".join(f"[{each}]" if each in "*?[" else each for each in path)
