"""Looks at a model's files without the network: are they there, are their headers sane, is every byte right."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from provision.core import hashing
from provision.models import safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from provision.config.models import ModelFile

_HEX = re.compile(r"[0-9a-f]+")


class Depth(IntEnum):
    """How closely a file is looked at. Where the whole hash is right, so is the header."""

    SIZE = 0
    HEADER = 1
    HASH = 2


@dataclass(frozen=True)
class FileState:
    """What is known of one file: `state` is ok, missing, corrupt or failed (it cannot be read); `size` in bytes."""

    path: str
    size: int | None
    state: str
    reason: str | None = None


def look(
    snapshot: Path, files: Sequence[ModelFile], depth: Depth, progress: Callable[[str, int], None] | None = None
) -> list[FileState]:
    """The state of each file of a snapshot, in their order.

    Args:
        snapshot: the folder of the revision.
        files: what should be in it.
        depth: how closely.
        progress: told (path, bytes) while files are hashed; what it raises ends the look.
    """
    if depth < Depth.HASH:
        return [_look(snapshot, file, depth, None) for file in files]
    # The largest first, so that the last thread to end has little left; hashing lets other threads run.
    sized = sorted(files, key=lambda file: -_size(snapshot / file.path))
    with ThreadPoolExecutor(min(_cores(), len(files))) as pool:
        found = dict(
            zip(
                [file.path for file in sized],
                pool.map(lambda file: _look(snapshot, file, depth, progress), sized),
                strict=True,
            )
        )
    return [found[file.path] for file in files]


def pins_of(file: ModelFile, path: Path) -> dict[str, str]:
    """The hashes that a file must have; where nobody named one, the name of its blob, which is its hash."""
    pins = {kind: pin for kind, pin in (("sha256", file.sha256), ("git_sha1", file.git_sha1)) if pin}
    if not pins:
        blob = blob_name(path) if path.is_symlink() else ""  # a copy's own name is no hash, whatever its length
        kind = {64: "sha256", 40: "git_sha1"}.get(len(blob)) if _HEX.fullmatch(blob) else None
        return {kind: blob} if kind else {}
    # One pass is enough to prove it, and sha256 is the stronger proof.
    return {"sha256": pins["sha256"]} if "sha256" in pins else pins


def blob_name(path: Path) -> str:
    """The blob that a snapshot's link leads to, by its name in its own repository: that may lead to a shared store."""
    return path.readlink().name if path.is_symlink() else path.name


def _look(snapshot: Path, file: ModelFile, depth: Depth, progress: Callable[[str, int], None] | None) -> FileState:
    path = snapshot / file.path
    try:
        size = path.stat().st_size
        reason = _wrong(path, size, file, depth, progress)
    except (FileNotFoundError, NotADirectoryError):
        return FileState(file.path, None, "missing", "is missing")
    except OSError as error:
        return FileState(file.path, None, "failed", f"cannot be read ({os.strerror(error.errno or 0)})")
    return FileState(file.path, size, "corrupt" if reason else "ok", reason)


def _wrong(
    path: Path, size: int, file: ModelFile, depth: Depth, progress: Callable[[str, int], None] | None
) -> str | None:
    if not path.is_file():
        return "is no file"
    if file.size is not None and size != file.size:
        return f"has {size:,} bytes, pinned are {file.size:,}"
    pins = pins_of(file, path) if depth >= Depth.HASH else {}
    if depth >= Depth.HEADER and not pins and file.path.endswith(".safetensors"):
        try:
            safetensors.read_header(path)
        except safetensors.WeightsError as error:
            return str(error)
    if depth >= Depth.HASH:
        told = None if progress is None else lambda count: progress(file.path, count)
        for kind, pin in pins.items():
            if hashing.hash_file(path, kind, told) != pin:
                return f"does not have its pinned {kind}"
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
