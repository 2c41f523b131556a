"""Finds the content of a file in the hub cache by its hash, so that it is not downloaded again."""

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
    """Yield the files of a hub cache that may have the content of a model's file.

    They are blobs by their name, and real files at the same path in snapshots: a cache that was copied with `cp -rL`,
    or filled without links, has real files. Folders of former ids are searched as well.

    Args:
        hub: the hub cache.
        spec: the model.
        path: the path of the file in the snapshot.
        names: the names that its blob may have.
        size: its size in bytes; None if it is not known.
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
    """Return the first of these files whose content has the right hashes; None without one.

    Args:
        files: the candidates.
        proof: {kind of hash: right hashes}.
    """
    for file in files:
        with suppress(OSError):
            if all(hashing.hash_file(file, kind) in digests for kind, digests in proof.items()):
                return file
    return None


def place(file: Path, blob: Path) -> None:
    """Give a verified file the name of a blob, by a hard link, or by a copy where none is possible."""
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
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)
