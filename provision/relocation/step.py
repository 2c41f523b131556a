"""The step that keeps folders of the home on the volume, each behind a link or, where none can be, a variable."""

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
    """The folders of one label lie on the volume, and their old paths are links to them.

    They are moved together, so that a file with names in several of them stays one file.
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
        """Take the label, each folder's old path, new place and variable, and who is told of a copy."""
        self.name = f"relocate {label}"
        self.places = places
        self.root = root
        self.home = home
        self.journal = journal
        self.progress = progress
        self._notes: list[str] = []

    def describe(self) -> str:
        """The plan's line."""
        first = self.places[0] if self.places else None
        more = f", and {len(self.places) - 1} more" if len(self.places) > 1 else ""
        return f"keep {first.source} at {first.target}, behind a link{more}" if first else "nothing here to keep"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no depth)
        """Look at each folder, its new place, and what an interrupted run left."""
        if not self.places:
            return Check(State.OK, "there is nothing of the kind on this host")
        found = [self._check(place) for place in self.places]
        state = next(each for each in _WORST if any(check.state is each for check in found))
        details = [check.detail for check in found if check.state is state]
        more = f", and {len(details) - 1} more" if len(details) > 1 else ""
        notes = [check.fallback for check in found if check.fallback] + self._notes
        return Check(state, details[0] + more, "; ".join(notes) or None)

    def apply(self) -> None:
        """Move what is there, merge where both are, link. Picks up where a killed run stopped."""
        mover = FolderMove(self.journal, self.progress)
        drifted = [place for place in self.places if self._check(place).state is State.DRIFTED]
        stuck = [place for place in drifted if _obstacle(place.source) is not None]
        pairs = [MovePair(place.source, place.target) for place in drifted if place not in stuck]
        wiped = {pair for pair in pairs if pair.is_wiped}
        mover.relink(wiped)
        try:
            mover.run([pair for pair in pairs if pair not in wiped])
        finally:
            if mover.conflicts:
                kept = ", ".join(mover.conflicts[:3]) + (", …" if len(mover.conflicts) > 3 else "")
                self._notes.append(f"{len(mover.conflicts)} files of both places differ: the older are kept as {kept}")
        for place in stuck:
            self._set_variable(place)

    def linked(self) -> Iterator[links.Link]:
        """The links of this step that stand."""
        for place in self.places:
            if link_target(place.source) == str(place.target):
                yield links.Link(place.source, place.target)

    def _check(self, place: RelocatedFolder) -> Check:
        source, target = place.source, place.target
        found = link_target(source)
        if found is not None:
            return self._check_link(place, found)
        if os.path.lexists(source):
            return self._check_real(place)
        with contextlib.suppress(OSError):
            if source.name == target.name and source.parent.samefile(target.parent):
                return Check(State.OK, f"{source} is on the volume itself")
        if target.exists():
            return Check(State.DRIFTED, f"{source} is not there; its data is at {target}")
        return Check(State.DRIFTED, f"{source} is not there yet")

    def _check_link(self, place: RelocatedFolder, found: str) -> Check:
        source, target = place.source, place.target
        if found != str(target):
            if found.startswith(f"{self.root.path}{os.sep}") or source in self._recorded:
                return Check(State.DRIFTED, f"{source} leads to {found}, it should lead to {target}")
            other = linked_root(source)
            message = f"{source} is a link to {found}, " + (
                f"on another root. Name that one: --root {other.path} (make: ROOT={other.path})"
                if other
                else f"which is not ours. Look at it: ls -l {source}"
            )
            return Check(State.BLOCKED, message)
        if not target.is_dir():
            return Check(State.DRIFTED, f"{source} leads to {target}, which is not there")
        if MovePair(source, target).unfinished:
            return Check(State.DRIFTED, f"an interrupted move of {source} is to be ended, its data is at {target}")
        return Check(State.OK, f"{source} -> {target}")

    def _check_real(self, place: RelocatedFolder) -> Check:
        source, target = place.source, place.target
        if not source.is_dir():
            return Check(State.BLOCKED, f"{source} is a file, not a folder. Look at it: ls -l {source}")
        if source.resolve().is_relative_to(self.root.path.resolve()):
            return Check(State.OK, f"{source} is on the volume itself")
        if (elsewhere := link_target(target)) is not None and elsewhere != str(target):
            return Check(State.BLOCKED, f"{target} is a link to {elsewhere}. Look at it: ls -l {target}")
        obstacle = _obstacle(source)
        if obstacle is not None:
            return self._check_variable(place, obstacle)
        if target.is_dir() and any(target.iterdir()):
            return Check(State.DRIFTED, f"{source} is a real folder again; it is merged with {target}")
        return Check(State.DRIFTED, f"{source} is a real folder")

    def _check_variable(self, place: RelocatedFolder, obstacle: str) -> Check:
        if place.variable is None:
            return Check(
                State.BLOCKED, f"{place.source} cannot become a link: {obstacle}. Change that, then run again."
            )
        note = f"{place.source} cannot become a link ({obstacle}): {place.variable}={place.target} does it instead"
        if variables.read(self.root).get(place.variable) == str(place.target):
            return Check(State.OK, note, f"{note}; in a shell: . {self.root.variables}")
        return Check(State.DRIFTED, note)

    def _set_variable(self, place: RelocatedFolder) -> None:
        """Copy what is there, which has to stay, and let the variable lead to the copy."""
        assert place.variable is not None  # noqa: S101 (the check has seen it)
        make_folders(place.target, self.journal)
        with OpenDir.at(place.source) as source, OpenDir.at(place.target) as target:
            if tree.is_empty(target):
                TreeCopy([(source, target)], lambda count, unit: self.progress(count, 0, unit)).run()
        variables.set_value(self.root, place.variable, str(place.target), self.journal)

    @functools.cached_property
    def _recorded(self) -> set[Path]:
        return {link.path for link in links.recorded(self.root, self.home)}


def _obstacle(source: Path) -> str | None:
    """Why no link can take the place of a folder that is there, or None."""
    if not os.path.lexists(source) or link_target(source) is not None:
        return None
    if not os.access(source.parent, os.W_OK | os.X_OK):
        return f"{source.parent} cannot be written"
    if source.stat().st_dev != source.parent.stat().st_dev:
        return "something is mounted there"
    return None
