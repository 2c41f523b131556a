"""Checks a model's files without the network: their presence, size, header or hash."""

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
    """Name the depths of a check.

    SIZE: the file is present and has its pinned size. HEADER: a safetensors file also has a valid header.
    HASH: the file also has its pinned hash. HASH does not read the header if a hash is known, since a file with the
    right hash has the right header.
    """

    SIZE = 0
    HEADER = 1
    HASH = 2


@dataclass(frozen=True)
class FileState:
    """Describe whether one file is present and correct.

    `path`: its path in the snapshot.
    `size`: in bytes; None if the file is missing or cannot be read.
    `state`: "ok", "missing", "corrupt" (wrong size, header or hash) or "failed" (the file cannot be read).
    `reason`: the end of a sentence whose subject is the file, such as "is missing"; None if `state` is "ok".
    """

    path: str
    size: int | None
    state: str
    reason: str | None = None


def check_files(
    snapshot: Path, files: Sequence[ModelFile], depth: Depth, progress: Callable[[str, int], None] | None = None
) -> list[FileState]:
    """Return the state of each file of a snapshot, in the order of `files`.

    Args:
        snapshot: the folder of the snapshot.
        files: the files that the snapshot should have.
        depth: the depth of the check.
        progress: called with (path, number of bytes hashed since the last call); an exception that it raises ends the
            check.
    """
    if depth < Depth.HASH:
        return [_check(snapshot, file, depth, None) for file in files]
    # The largest files come first, so that all threads end at about the same time. Hashing releases the GIL.
    sized = sorted(files, key=lambda file: -_size(snapshot / file.path))
    with ThreadPoolExecutor(min(_cores(), len(files))) as pool:
        states = dict(
            zip(
                [file.path for file in sized],
                pool.map(lambda file: _check(snapshot, file, depth, progress), sized),
                strict=True,
            )
        )
    return [states[file.path] for file in files]


def pins_of(file: ModelFile, path: Path) -> dict[str, str]:
    """Return {kind: hash} with the one hash that a file must have, or {} if no hash is known.

    It is the pinned sha256, else the pinned git_sha1, else the name of the blob to which the path is a link: the name
    of a blob is its hash.

    Args:
        file: the file in the entry of the manifest.
        path: its path in the snapshot.
    """
    pins = {kind: pin for kind, pin in (("sha256", file.sha256), ("git_sha1", file.git_sha1)) if pin}
    if not pins:
        # The name of a file that is not a link is not a hash, even if it has the length of a hash.
        blob = blob_name(path) if path.is_symlink() else ""
        kind = {64: "sha256", 40: "git_sha1"}.get(len(blob)) if _HEX.fullmatch(blob) else None
        return {kind: blob} if kind else {}
    # One hash is sufficient, and sha256 is stronger than sha1.
    return {"sha256": pins["sha256"]} if "sha256" in pins else pins


def blob_name(path: Path) -> str:
    """Return the name of the blob to which a link in a snapshot leads; for another file, the name of the file.

    Only the first link is followed, since the blob may itself be a link into the store that repositories share.
    """
    return path.readlink().name if path.is_symlink() else path.name


def _check(snapshot: Path, file: ModelFile, depth: Depth, progress: Callable[[str, int], None] | None) -> FileState:
    """Return the state of one file, as `check_files` does."""
    path = snapshot / file.path
    try:
        size = path.stat().st_size
        reason = _fault(path, size, file, depth, progress)
    except (FileNotFoundError, NotADirectoryError):
        return FileState(file.path, None, "missing", "is missing")
    except OSError as error:
        return FileState(file.path, None, "failed", f"cannot be read ({os.strerror(error.errno or 0)})")
    return FileState(file.path, size, "corrupt" if reason else "ok", reason)


def _fault(
    path: Path, size: int, file: ModelFile, depth: Depth, progress: Callable[[str, int], None] | None
) -> str | None:
    """Return what is wrong with a file, as for `FileState.reason`; None if nothing is."""
    if not path.is_file():
        return "is not a regular file"
    if file.size is not None and size != file.size:
        return f"has {size:,} bytes, but the pinned size is {file.size:,} bytes"
    pins = pins_of(file, path) if depth >= Depth.HASH else {}
    if depth >= Depth.HEADER and not pins and file.path.endswith(".safetensors"):
        try:
            safetensors.read_header(path)
        except safetensors.WeightsError as error:
            return str(error)
    if depth >= Depth.HASH:
        report = None if progress is None else lambda count: progress(file.path, count)
        for kind, pin in pins.items():
            if hashing.hash_file(path, kind, report) != pin:
                return f"does not have its pinned {kind}"
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
