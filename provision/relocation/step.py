"""Provides the step that keeps folders of the home on the volume, by a link or, if none is possible, a variable."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING

from provision.core.layout import linked_root
from provision.core.progress import no_progress
from provision.core.step import Check, State
from provision.fs import tree
from provision.fs.copy_tree import TreeCopy
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import whole_folders
from provision.relocation.move import FolderMove, MovePair
from provision.volume import links, variables
from provision.volume.changes import make_folders

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.host.tool_caches import RelocatedFolder
    from provision.volume.journal import Journal

_WORST = (State.BLOCKED, State.DRIFTED, State.OK)


class RelocateStep:
    """Keeps the folders of one label on the volume, with links to them at their old paths.

    The folders are moved together, so that hard links between them are kept. A folder that cannot become a link (its
    parent is not writable, or it is a mount point) is copied, and its tool's variable is set to the copy.
    """

    essential = False
    local = True

    def __init__(
        self,
        label: str,
        places: Sequence[RelocatedFolder],
        root: Root,
        home: Path,
        journal: Journal,
        progress: Progress = no_progress,
    ) -> None:
        """Take the label, the folders with their old paths, new paths and variables, and the progress callback."""
        self.name = f"relocate {label}"
        self.places = places
        self.root = root
        self.home = home
        self.journal = journal
        self.progress = progress
        self._notes: list[str] = []

    def describe(self) -> str:
        """Return the line of the plan."""
        first = self.places[0] if self.places else None
        more = f", and {len(self.places) - 1} more" if len(self.places) > 1 else ""
        return f"move {first.source} to {first.target} and link it{more}" if first else "no folder to move"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no deeper check)
        """Check each link, its target, and the rest of an interrupted move; return the worst state."""
        if not self.places:
            return Check(State.OK, "this host has no such folder")
        checks = [self._check(place) for place in self.places]
        state = next(state for state in _WORST if any(check.state is state for check in checks))
        details = [check.detail for check in checks if check.state is state]
        more = f", and {len(details) - 1} more" if len(details) > 1 else ""
        notes = [check.fallback for check in checks if check.fallback] + self._notes
        return Check(state, details[0] + more, "; ".join(notes) or None)

    def apply(self) -> None:
        """Make the links of wiped folders, move or merge the other folders, and set variables where no link can be."""
        mover = FolderMove(self.journal, self.progress)
        drifted = [place for place in self.places if self._check(place).state is State.DRIFTED]
        unlinkable = [place for place in drifted if _obstacle(place.source) is not None]
        pairs = [MovePair(place.source, place.target) for place in drifted if place not in unlinkable]
        wiped = {pair for pair in pairs if pair.is_wiped}
        mover.relink(wiped)
        try:
            mover.run([pair for pair in pairs if pair not in wiped])
        finally:
            self._notes += dict.fromkeys(mover.kept_whole)
            if mover.conflicts:
                paths = ", ".join(mover.conflicts[:3]) + (", …" if len(mover.conflicts) > 3 else "")
                self._notes.append(
                    f"{len(mover.conflicts)} files differ between the merged folders; the older versions are at {paths}"
                )
        for place in unlinkable:
            self._set_variable(place)

    def linked(self) -> Iterator[links.Link]:
        """Yield the links of this step that are in place."""
        for place in self.places:
            if link_target(place.source) == str(place.target):
                yield links.Link(place.source, place.target)

    def _check(self, place: RelocatedFolder) -> Check:
        source, target = place.source, place.target
        destination = link_target(source)
        if destination is not None:
            return self._check_link(place, destination)
        if os.path.lexists(source):
            return self._check_real(place)
        with contextlib.suppress(OSError):
            if source.name == target.name and source.parent.samefile(target.parent):
                return Check(State.OK, f"{source} is on the volume itself")
        if target.exists():
            return Check(State.DRIFTED, f"the link {source} is missing; its data is at {target}")
        return Check(State.DRIFTED, f"{source} does not exist yet")

    def _check_link(self, place: RelocatedFolder, destination: str) -> Check:
        source, target = place.source, place.target
        if destination != str(target):
            if destination.startswith(f"{self.root.path}{os.sep}") or source in self._recorded:
                return Check(State.DRIFTED, f"{source} is a link to {destination}, it should be a link to {target}")
            other = linked_root(source)
            message = f"{source} is a link to {destination}, " + (
                f"on another root. Name that one: --root {other.path} (make: ROOT={other.path})"
                if other
                else f"which firstlight did not make. Look at it: ls -l {source}"
            )
            return Check(State.BLOCKED, message)
        if not target.is_dir():
            return Check(State.DRIFTED, f"{source} is a link to {target}, which does not exist")
        if MovePair(source, target).unfinished:
            return Check(State.DRIFTED, f"the move of {source} was interrupted; its data is at {target}")
        return Check(State.OK, f"{source} -> {target}")

    def _check_real(self, place: RelocatedFolder) -> Check:
        source, target = place.source, place.target
        if not source.is_dir():
            return Check(State.BLOCKED, f"{source} is a file, not a folder. Look at it: ls -l {source}")
        if source.resolve().is_relative_to(self.root.path.resolve()):
            return Check(State.OK, f"{source} is on the volume itself")
        if (destination := link_target(target)) is not None and destination != str(target):
            return Check(State.BLOCKED, f"{target} is a link to {destination}. Look at it: ls -l {target}")
        obstacle = _obstacle(source)
        if obstacle is not None:
            return self._check_variable(place, obstacle)
        if target.is_dir() and any(target.iterdir()):
            return _check_merge(source, target)
        return Check(State.DRIFTED, f"{source} is a real folder, to be moved to {target}")

    def _check_variable(self, place: RelocatedFolder, obstacle: str) -> Check:
        if place.variable is None:
            return Check(
                State.BLOCKED, f"{place.source} cannot become a link: {obstacle}. Change that, then run again."
            )
        note = f"{place.source} cannot become a link ({obstacle}); {place.variable}={place.target} is used instead"
        if variables.read(self.root).get(place.variable) == str(place.target):
            return Check(State.OK, note, f"{note}. Set it in a shell: . {self.root.variables}")
        return Check(State.DRIFTED, note)

    def _set_variable(self, place: RelocatedFolder) -> None:
        """Copy a folder that cannot be replaced by a link, and set its tool's variable to the copy."""
        assert place.variable is not None  # noqa: S101 (`_check_variable` blocks a folder without a variable)
        make_folders(place.target, self.journal)
        with OpenDir.at(place.source) as source, OpenDir.at(place.target) as target:
            if tree.is_empty(target):
                TreeCopy([(source, target)], lambda count, unit: self.progress(count, 0, unit)).run()
        variables.set_value(self.root, place.variable, str(place.target), self.journal)

    @functools.cached_property
    def _recorded(self) -> set[Path]:
        return {link.path for link in links.recorded(self.root, self.home)}


def _check_merge(source: Path, target: Path) -> Check:
    with OpenDir.at(source) as original, OpenDir.at(target) as other:
        conflict = whole_folders.conflict(original, other)
    if conflict is not None:
        return Check(State.BLOCKED, conflict)
    return Check(State.DRIFTED, f"{source} is a real folder again, to be merged into {target}")


def _obstacle(source: Path) -> str | None:
    """Return the reason why a link cannot replace this folder, or None."""
    if not os.path.lexists(source) or link_target(source) is not None:
        return None
    if not os.access(source.parent, os.W_OK | os.X_OK):
        return f"{source.parent} is not writable"
    if source.stat().st_dev != source.parent.stat().st_dev:
        return "it is a mount point"
    return None
