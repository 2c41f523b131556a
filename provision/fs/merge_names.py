"""Computes the names and paths of entries in a merged folder."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from provision.fs.open_dir import OpenDir

_LONGEST_NAME = 255


def displaced_name(folder: OpenDir, name: str, status: os.stat_result) -> str:
    """Return the new name for an entry that does not keep its name: NAME.firstlight-HASH.

    HASH is the start of a hash of the content, so a repeated merge returns the same name.
    """
    if stat.S_ISREG(status.st_mode):
        digest = hashlib.sha256()
        descriptor = folder.open(name, os.O_RDONLY)
        with os.fdopen(descriptor, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    elif stat.S_ISLNK(status.st_mode):
        digest = hashlib.sha256(os.fsencode(folder.readlink(name) or ""))
    else:
        digest = hashlib.sha256(f"{status.st_mode} {status.st_mtime_ns}".encode())
    return with_suffix(name, f".firstlight-{digest.hexdigest()[:12]}")


def with_suffix(name: str, suffix: str) -> str:
    """Return the name with a suffix; the name is cut so that the result has at most 255 bytes."""
    encoded = os.fsencode(name)
    return os.fsdecode(encoded[: _LONGEST_NAME - len(os.fsencode(suffix))]) + suffix


def free_name(folder: OpenDir, name: str) -> str:
    """Return the name; if the folder has an entry of that name, the first free one of NAME-2, NAME-3 and so on."""
    numbered = (with_suffix(name, f"-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([name], numbered) if folder.lstat(candidate) is None)


def sibling(path: str, name: str) -> str:
    """Return the relative path of the entry `name` in the parent folder of `path`."""
    return f"{path.rpartition('/')[0]}/{name}".removeprefix("/")


def base_name(path: str | None) -> str:
    """Return the last component of a relative path; "" for None."""
    return (path or "").rpartition("/")[2]


def parents_of(path: str) -> Iterator[str]:
    """Yield the parent folders of a relative path, the nearest first."""
    while path := path.rpartition("/")[0]:
        yield path
