"""Finds files in the hub cache that have the content of a missing file, so that the content is not downloaded again."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

from provision.config.models import cache_folder
from provision.core import hashing
from provision.fs import durable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from provision.config.models import ModelSpec


def candidates(hub: Path, spec: ModelSpec, path: str, names: Collection[str], size: int | None) -> Iterator[Path]:
    """Yield the files of a hub cache that may have the content of a model's file; their hashes are not checked.

    They are the blobs with one of the names, and the real files at the same path in other snapshots. A cache has real
    files if it was copied with `cp -rL`, or is on a file system without links. Folders of former ids are searched too.

    Args:
        hub: the hub cache.
        spec: the entry of the manifest.
        path: the path of the file in the snapshot.
        names: the names that the blob of the file may have.
        size: the size of the file in bytes; None if it is not known.
    """
    folders = [hub / spec.folder, *(hub / cache_folder(repo) for repo in spec.former_repos)]
    for repo in [folder for folder in folders if not folder.is_symlink()]:
        blobs = [repo / "blobs" / name for name in sorted(names)]
        files = [file for file in sorted((repo / "snapshots").glob("*/" + _escaped(path))) if not file.is_symlink()]
        for file in (*blobs, *files):
            with suppress(OSError):
                if file.is_file() and size in {None, file.stat().st_size}:
                    yield file


def verified(files: Iterator[Path], proof: Mapping[str, Collection[str]]) -> Path | None:
    """Return the first of these files whose content has the right hashes; None if there is none.

    Args:
        files: the files to hash.
        proof: {kind of hash: the right hashes, one of which the file must have}.
    """
    for file in files:
        with suppress(OSError):
            if all(hashing.hash_file(file, kind) in digests for kind, digests in proof.items()):
                return file
    return None


def place(file: Path, blob: Path) -> None:
    """Make a blob from a verified file: a hard link to the file, or a copy if a hard link is not possible.

    Args:
        file: the path of the verified file.
        blob: the path of the blob to make.
    """
    temporary = blob.with_name(f".{blob.name}.{secrets.token_hex(4)}.firstlight-copy")
    try:
        try:
            os.link(file.resolve(), temporary)
        except OSError:
            shutil.copyfile(file, temporary)
            durable.sync_file(temporary)
        temporary.replace(blob)
    finally:
        temporary.unlink(missing_ok=True)


def _escaped(path: str) -> str:
    """Return a glob pattern that matches only this path."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)
