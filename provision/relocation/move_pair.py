"""Names the paths of one folder move, and opens the parent folders of its old path and its new path."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.fs import tree
from provision.fs.open_dir import OpenDir
from provision.volume.changes import make_folders

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from provision.volume.journal import Journal


@dataclass(frozen=True)
class MovePair:
    """Hold the two paths of a folder move: `source` is the old path, which becomes a link to `target`, the new path."""

    source: Path
    target: Path

    @property
    def aside(self) -> Path:
        """Return the path that the original folder has after the link took its place, and before it is deleted."""
        return beside(self.source, "aside")

    @property
    def partial(self) -> Path:
        """Return the path of the unfinished copy, which lies beside the target."""
        return beside(self.target, "partial")

    @property
    def unfinished(self) -> bool:
        """Return whether a killed run left an original folder at `aside` or an unfinished copy at `partial`."""
        return os.path.lexists(self.aside) or os.path.lexists(self.partial)

    @property
    def is_wiped(self) -> bool:
        """Return whether only the link is missing, as after a wipe: the target exists, and no move is unfinished."""
        return not os.path.lexists(self.source) and self.target.is_dir() and not self.unfinished


class OpenPair:
    """Hold the paths of a move, with open descriptors of the two parent folders."""

    def __init__(self, paths: MovePair, source_parent: OpenDir, target_parent: OpenDir) -> None:
        """Take the paths, and the open parent folders of the source and the target."""
        self.paths = paths
        self.source_parent, self.source_name = source_parent, paths.source.name
        self.target_parent, self.target_name = target_parent, paths.target.name
        self.aside_name, self.partial_name = paths.aside.name, paths.partial.name

    @property
    def ends(self) -> tuple[Path, Path]:
        """Return (old path, new path) of the folder, below the real paths of the open parent folders."""
        return self.paths.source, self.paths.target

    @property
    def source_is_real(self) -> bool:
        """Return whether the old path is a real folder, not a link."""
        status = self.source_parent.lstat(self.source_name)
        is_folder = status is not None and stat.S_ISDIR(status.st_mode)
        return is_folder and self.source_parent.readlink(self.source_name) is None

    @property
    def target_is_filled(self) -> bool:
        """Return whether the new path is a folder with at least one file."""
        status = self.target_parent.lstat(self.target_name)
        if status is None or not stat.S_ISDIR(status.st_mode):
            return False
        with self.target_parent.enter(self.target_name) as target:
            return not tree.is_empty(target)


@contextlib.contextmanager
def open_parents(paths: MovePair, journal: Journal) -> Iterator[OpenPair]:
    """Make and open the parent folders of both paths during a `with` block, and yield the pair with them."""
    make_folders(paths.target.parent, journal)
    make_folders(paths.source.parent, journal)
    with OpenDir.at(paths.source.parent) as source_parent, OpenDir.at(paths.target.parent) as target_parent:
        yield OpenPair(paths, source_parent, target_parent)


def partial_folder(pair: OpenPair, *, has_owners: bool) -> OpenDir:
    """Open the folder of the unfinished copy during a `with` block; make the folder if it is missing.

    `has_owners` is False if the file system sets one owner for all entries; the owner is then not checked.

    Raises:
        BlockedError: the folder belongs to another user.
    """
    if pair.target_parent.lstat(pair.partial_name) is None:
        pair.target_parent.make(pair.partial_name)
    partial = pair.target_parent.enter(pair.partial_name)
    if has_owners and partial.descriptor is not None and os.fstat(partial.descriptor).st_uid != os.geteuid():
        partial.close()
        raise BlockedError(
            f"{pair.paths.partial} belongs to another user. Look at the folder: ls -ld {pair.paths.partial}"
        )
    return partial


def beside(path: Path, purpose: str) -> Path:
    """Return a hidden path in the parent folder of `path`, whose name contains the name of `path` and `purpose`.

    A name of more than 255 bytes, the limit of file systems, is replaced by its hash.
    """
    suffix = f".firstlight-{purpose}"
    name = path.name
    if len(os.fsencode(name)) + len(suffix) + 1 > 255:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}{suffix}")


def has_set_group_id(folder: OpenDir) -> bool:
    """Return whether a folder has the set-group-ID bit, so that new entries get the folder's group."""
    return folder.descriptor is not None and bool(os.fstat(folder.descriptor).st_mode & stat.S_ISGID)
