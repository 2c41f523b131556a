"""Names the paths of one folder move, and opens the two folders in which they lie."""

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
    """Hold the old path of a folder, which becomes a link, and its new path, the target of the link."""

    source: Path
    target: Path

    @property
    def aside(self) -> Path:
        """Return the path of the original folder between the swap with the link and its removal."""
        return beside(self.source, "aside")

    @property
    def partial(self) -> Path:
        """Return the path of the unfinished copy, beside the target."""
        return beside(self.target, "partial")

    @property
    def unfinished(self) -> bool:
        """Return whether a killed run left an original or an unfinished copy behind."""
        return os.path.lexists(self.aside) or os.path.lexists(self.partial)

    @property
    def is_wiped(self) -> bool:
        """Return whether only the link is missing: the target is complete and nothing is left to clean up."""
        return not os.path.lexists(self.source) and self.target.is_dir() and not self.unfinished


class OpenPair:
    """Hold the paths of a move, with open descriptors of the two parent folders."""

    def __init__(self, paths: MovePair, source_parent: OpenDir, target_parent: OpenDir) -> None:
        """Take the paths, and the two open folders."""
        self.paths = paths
        self.source_parent, self.source_name = source_parent, paths.source.name
        self.target_parent, self.target_name = target_parent, paths.target.name
        self.aside_name, self.partial_name = paths.aside.name, paths.partial.name

    @property
    def ends(self) -> tuple[Path, Path]:
        """Return the old path and the new path of the folder."""
        return self.paths.source, self.paths.target

    @property
    def source_is_real(self) -> bool:
        """Return whether the old path is a folder, and no link."""
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
    """Make the folders in which both paths lie, and yield the pair with both open."""
    make_folders(paths.target.parent, journal)
    make_folders(paths.source.parent, journal)
    with OpenDir.at(paths.source.parent) as source_parent, OpenDir.at(paths.target.parent) as target_parent:
        yield OpenPair(paths, source_parent, target_parent)


def partial_folder(pair: OpenPair, *, has_owners: bool) -> OpenDir:
    """Open the folder of the unfinished copy, made if it is missing; refuse a folder of another user.

    Without owners (`has_owners`) every folder of the file system has the same one, which says nothing.
    """
    if pair.target_parent.lstat(pair.partial_name) is None:
        pair.target_parent.make(pair.partial_name)
    partial = pair.target_parent.enter(pair.partial_name)
    if has_owners and partial.descriptor is not None and os.fstat(partial.descriptor).st_uid != os.geteuid():
        partial.close()
        raise BlockedError(f"{pair.paths.partial} belongs to another user. Look at it: ls -ld {pair.paths.partial}")
    return partial


def beside(path: Path, purpose: str) -> Path:
    """Return a hidden path beside `path`; a name over 255 bytes, the limit of file systems, becomes its hash."""
    suffix = f".firstlight-{purpose}"
    name = path.name
    if len(os.fsencode(name)) + len(suffix) + 1 > 255:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}{suffix}")


def has_set_group_id(folder: OpenDir) -> bool:
    """Return whether new entries of a folder get its group, because it has the set-group-ID bit."""
    return folder.descriptor is not None and bool(os.fstat(folder.descriptor).st_mode & stat.S_ISGID)
