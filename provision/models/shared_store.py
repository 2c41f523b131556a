"""Reads the shared blob store of huggingface_hub 2.x, and deletes payloads that no repository links any more.

The store is `blobs/XX/XET_HASH` in the hub cache. A blob of a repository is a link to a payload there.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from provision.core.layout import is_same_place
from provision.fs.file_lock import FOR_ALL

# Source: SHARED_BLOBS_MARKER_NAME and SHARED_BLOBS_LAYOUT_VERSION in huggingface_hub's utils/_shared_blobs.py.
_MARKER, _VERSION = ".huggingface-shared-blobs", "1"
_HASH = re.compile(r"[0-9a-f]{64}")
_LOCK_SECONDS = 10.0


def payload_of(blob: Path) -> Path | None:
    """Return the payload in the store to which the link of a blob leads; None for another blob.

    A link to the store of a folder that is gone leads to the payload of the same name in this cache.
    """
    try:
        target = Path(os.path.normpath(blob.parent / blob.readlink()))
    except OSError:
        return None
    store = blob.parent.parent.parent / "blobs"
    if not _HASH.fullmatch(target.name) or target.parent.name != target.name[:2] or not _is_store(store):
        return None
    payload = store / target.parent.name / target.name
    if payload.is_symlink() or not payload.is_file():
        return None
    return payload if is_same_place(target, payload) or not target.exists() else None


def references(hub: Path) -> dict[Path, set[Path]]:
    """Return {payload: the blobs of repositories that are links to it} of a hub cache."""
    linked: dict[Path, set[Path]] = {}
    for repo in hub.glob("*--*"):
        if repo.is_symlink() and repo.resolve().parent == hub.resolve():
            continue  # a former id of a repository beside it
        for blob in repo.glob("blobs/*"):
            payload = payload_of(blob)
            if payload is not None:
                linked.setdefault(payload, set()).add(blob)
    return linked


def unreferenced(hub: Path) -> dict[Path, int]:
    """Return {payload: bytes} of the payloads that no repository links."""
    store = hub / "blobs"
    if not _is_store(store):
        return {}
    linked = references(hub)
    payloads = [path for path in store.glob("??/*") if _HASH.fullmatch(path.name) and not path.is_symlink()]
    return {path: path.stat().st_size for path in payloads if path.is_file() and path not in linked}


def relink(blob: Path, payload: Path) -> None:
    """Replace a dangling link of a blob by a relative link to the payload, as huggingface_hub makes it."""
    temporary = blob.with_name(f".{blob.name}.{os.getpid():08x}.shared")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(payload, blob.parent))
    temporary.replace(blob)


def drop(payload: Path) -> None:
    """Delete a payload and its manifest of references, unless a repository links it.

    The client's lock of the payload is held: the client takes it before it makes a link. While the client holds it,
    the payload stays.
    """
    import filelock

    lock = filelock.FileLock(payload.with_name(f"{payload.name}.lock"), mode=FOR_ALL)
    with suppress(filelock.Timeout), lock.acquire(timeout=_LOCK_SECONDS):
        if payload not in references(payload.parent.parent.parent):
            payload.unlink(missing_ok=True)
            payload.with_name(f"{payload.name}.refs").unlink(missing_ok=True)


def _is_store(folder: Path) -> bool:
    """Return whether a folder has the marker of the client; another folder of this name is left alone."""
    try:
        return (folder / _MARKER).read_text(encoding="utf-8").strip() == _VERSION
    except (OSError, UnicodeDecodeError):
        return False
