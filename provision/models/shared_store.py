"""Reads the shared store of huggingface_hub 2.x, and deletes the payloads to which no repository has a link any more.

A payload is a file `blobs/XX/XET_HASH` in the hub cache; the folder `blobs` is the store. A blob of a repository is a
link to a payload.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from provision.core.layout import is_same_place
from provision.fs.file_lock import FOR_ALL
from provision.models.main_ref import read_text

# Source: SHARED_BLOBS_MARKER_NAME and SHARED_BLOBS_LAYOUT_VERSION in huggingface_hub's utils/_shared_blobs.py.
_MARKER, _VERSION = ".huggingface-shared-blobs", "1"
_HASH = re.compile(r"[0-9a-f]{64}")
_LOCK_SECONDS = 10.0


def payload_of(blob: Path) -> Path | None:
    """Return the path of the payload to which a blob is a link; None if the blob is no link to a payload.

    If the blob is a dangling link into the store of another folder, the payload with the same name in the store of
    this cache is returned. Such a link is left after the cache has been moved.
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
    """Return {payload: the blobs that are links to the payload} for all repositories of a hub cache."""
    linked: dict[Path, set[Path]] = {}
    for repo in hub.glob("*--*"):
        if repo.is_symlink() and repo.resolve().parent == hub.resolve():
            continue  # a link by the former id of another repository in this cache
        for blob in repo.glob("blobs/*"):
            payload = payload_of(blob)
            if payload is not None:
                linked.setdefault(payload, set()).add(blob)
    return linked


def unreferenced(hub: Path) -> dict[Path, int]:
    """Return {payload: size in bytes} of the payloads to which no repository of a hub cache has a link."""
    store = hub / "blobs"
    if not _is_store(store):
        return {}
    linked = references(hub)
    payloads = [path for path in store.glob("??/*") if _HASH.fullmatch(path.name) and not path.is_symlink()]
    return {path: path.stat().st_size for path in payloads if path.is_file() and path not in linked}


def relink(blob: Path, payload: Path) -> None:
    """Replace a blob that is a dangling link by a relative link to its payload, as huggingface_hub makes such links."""
    temporary = blob.with_name(f".{blob.name}.{os.getpid():08x}.shared")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(payload, blob.parent))
    temporary.replace(blob)


def drop(payload: Path) -> None:
    """Delete a payload and its list of references (`.refs`), unless a repository has a link to the payload.

    huggingface_hub's lock of the payload is held meanwhile, because huggingface_hub takes the lock before it makes a
    link. If another process holds the lock for more than 10 s, the payload is not deleted.
    """
    import filelock

    lock = filelock.FileLock(payload.with_name(f"{payload.name}.lock"), mode=FOR_ALL)
    with suppress(filelock.Timeout), lock.acquire(timeout=_LOCK_SECONDS):
        if payload not in references(payload.parent.parent.parent):
            payload.unlink(missing_ok=True)
            payload.with_name(f"{payload.name}.refs").unlink(missing_ok=True)


def _is_store(folder: Path) -> bool:
    """Return whether a folder has huggingface_hub's marker of a shared store, in the known version."""
    return read_text(folder / _MARKER) == _VERSION
