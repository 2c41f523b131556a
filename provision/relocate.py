"""Moves a folder onto the volume and leaves a link: no source goes before its copy is verified by content."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from provision.errors import BlockedError, FirstlightError
from provision.hashing import sha256
from provision.paths import linked_root
from provision.step import Check, State

if TYPE_CHECKING:
    from provision.journal import Journal

_HEADROOM = 1.1


class RelocateStep:
    """One folder of the home lies on the volume, and its old path is a link to it.

    Every state that a killed run can leave is told from what lies on the disk: the source, the target,
    `.NAME.firstlight-partial` beside the target (an unfinished copy), and `.NAME.firstlight-aside` beside
    the source (a source whose verified copy has taken its place).
    """

    essential = False
    local = True

    def __init__(self, label: str, source: Path, target: Path, journal: Journal) -> None:
        """Take the folder's label, its path in the home, and its place on the volume."""
        self.name = f"relocate {label}"
        self.source = source
        self.target = target
        self.journal = journal
        self.aside = source.with_name(f".{source.name}.firstlight-aside")
        self.partial = target.with_name(f".{target.name}.firstlight-partial")

    def describe(self) -> str:
        """The plan's line."""
        return f"keep {self.source} at {self.target}, behind a link"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no depth)
        """Look at the source, the target and what an interrupted run left."""
        source, target = self.source, self.target
        if source.is_symlink():
            return self._check_link()
        if source.exists():
            if _is_within(source, target.parent):
                return Check(State.OK, f"{source} is on the volume itself")
            return self._check_real()
        if target.exists():
            return Check(State.DRIFTED, f"{source} is not there; its data is at {target}")
        return Check(State.DRIFTED, f"{source} is not there yet")

    def apply(self) -> None:
        """Move what is there, then link. Picks up where a killed run stopped."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.source.parent.mkdir(parents=True, exist_ok=True)
        if self.source.exists() and not self.source.is_symlink():
            self._clear_source()
        self.target.mkdir(exist_ok=True)
        if not self.source.is_symlink():
            self.journal.record("link", source=self.source, target=self.target)
            self.source.symlink_to(self.target)
        if self.aside.exists():
            _verify_inside(self.aside, self.target)
            self.journal.record("drop", aside=self.aside, copy=self.target)
            shutil.rmtree(self.aside)

    def _check_link(self) -> Check:
        found = self.source.readlink()
        if found != self.target:
            other = linked_root(self.source)
            message = f"{self.source} is a link to {found}, " + (
                f"on another root. Name that one: --root {other.path} (make: ROOT={other.path})"
                if other
                else f"which is not ours. Look at it: ls -l {self.source}"
            )
            return Check(State.BLOCKED, message)
        if not self.target.is_dir():
            return Check(State.DRIFTED, f"{self.source} leads to {self.target}, which is not there")
        if self.aside.exists():
            return Check(State.DRIFTED, f"{self.aside} waits to be dropped, its copy is at {self.target}")
        return Check(State.OK, f"{self.source} -> {self.target}")

    def _check_real(self) -> Check:
        if not self.source.is_dir():
            message = f"{self.source} is a file, not a folder. Look at it: ls -l {self.source}"
            return Check(State.BLOCKED, message)
        files = _listing(self.source)
        there = _listing(self.target) if self.target.is_dir() else {}
        if files and there and any(there.get(path) != size for path, size in files.items()):
            return Check(
                State.BLOCKED,
                f"{self.source} and {self.target} both hold files, and not the same ones. "
                f"Compare them: diff -rq {self.source} {self.target}; move one away, then run again.",
            )
        return Check(State.DRIFTED, f"{self.source} is a real folder ({sum(files.values()):,} bytes)")

    def _clear_source(self) -> None:
        """Get the real folder out of the link's way, its data safe at the target."""
        files = _listing(self.source)
        if not files:
            self.journal.record("remove-empty", source=self.source)
            _remove_empty(self.source)
            return
        if not (self.target.is_dir() and _listing(self.target)):
            if self._renamed():
                return
            self._copy(sum(files.values()))
        _verify_inside(self.source, self.target)
        self.journal.record("aside", source=self.source, aside=self.aside, copy=self.target)
        self.source.rename(self.aside)

    def _renamed(self) -> bool:
        """Move by a rename where both lie on one file system."""
        if self.source.stat().st_dev != self.target.parent.stat().st_dev:
            return False
        if self.target.is_dir():
            _remove_empty(self.target)
        self.journal.record("rename", source=self.source, target=self.target)
        try:
            self.source.rename(self.target)
        except OSError as error:
            if error.errno == errno.EXDEV:  # overlayfs: a folder of an image layer cannot be renamed
                return False
            raise
        return True

    def _copy(self, size: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if free < size * _HEADROOM:
            raise BlockedError(
                f"{self.target.parent}: {free:,} bytes are free and {round(size * _HEADROOM):,} are needed to move "
                f"{self.source}. Free some, or give another --root."
            )
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.journal.record("copy", source=self.source, partial=self.partial)
        shutil.copytree(self.source, self.partial, symlinks=True)
        _verify_inside(self.source, self.partial)
        _fsync_tree(self.partial)
        if self.target.is_dir():
            _remove_empty(self.target)
        self.partial.rename(self.target)


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _listing(folder: Path) -> dict[str, int]:
    """{relative path: bytes} of every file; a link counts with the length of its target's name."""
    found = {}
    for base, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(base) / name).is_symlink()]
        for name in (*files, *links):
            path = Path(base) / name
            found[str(path.relative_to(folder))] = path.lstat().st_size
    return found


def _verify_inside(original: Path, copy: Path) -> None:
    """Prove by content that every file and link of `original` is in `copy`.

    Raises:
        FirstlightError: a file differs or is missing; nothing was removed.
    """
    for relative in sorted(_listing(original)):
        first, second = original / relative, copy / relative
        if first.is_symlink():
            same = second.is_symlink() and first.readlink() == second.readlink()
        else:
            same = second.is_file() and not second.is_symlink() and sha256(first) == sha256(second)
        if not same:
            raise FirstlightError(
                f"{second} is not the same as {first}: something wrote there during the move. "
                "Nothing was removed. End what uses it, then run again."
            )


def _fsync_tree(folder: Path) -> None:
    for base, _, files in os.walk(folder):
        for name in (*files, "."):
            path = Path(base) / name
            if path.is_symlink():
                continue
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _remove_empty(folder: Path) -> None:
    """Remove a tree of empty folders; a file that has appeared in it stops this with its name."""
    for base, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            (Path(base) / name).rmdir()
    folder.rmdir()
