"""Provides the setup step that keeps folders of the home on the volume, by a link or an environment variable."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.layout import linked_root
from provision.core.progress import no_progress
from provision.core.step import Check, State
from provision.fs import capabilities, tree
from provision.fs.copy_tree import TreeCopy
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import outgoing_links, preflight, whole_folders
from provision.relocation.move import FolderMove
from provision.relocation.move_pair import MovePair
from provision.volume import home_record, links, variables, volume_capabilities
from provision.volume.changes import make_folders
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.fs.capabilities import Capabilities
    from provision.host.tool_caches import RelocatedFolder
    from provision.volume.journal import Journal

_WORST = (State.BLOCKED, State.DRIFTED, State.OK)


class Claim(Enum):
    """Name the reason why a folder should be on the volume. The reason limits the changes to the user's own files.

    LISTED: host.toml or the command names the folder. DEFAULT: the provider profile or firstlight's default names it.
    For these two, a real folder is moved or merged. RECORDED: an earlier run with this host name and home made a link
    at the path; a real folder is merged only if the record in this home has had the link, too. UNKNOWN: a record
    without an owner names the path; a link is made only if nothing exists at the path.
    """

    LISTED = "listed"
    DEFAULT = "default"
    RECORDED = "recorded"
    UNKNOWN = "unknown"


class RelocateStep:
    """Keeps a group of folders on the volume, with links to them at their old paths.

    The folders are moved together, so that hard links between them are kept. If a folder cannot become a link, because
    its parent folder is not writable or it is a mount point, it is copied. The environment variable of its tool is
    then set to the copy.

    A link that the user has made stays as it is. If it leads to a folder in the root, it is recorded.
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
        *,
        claim: Claim = Claim.LISTED,
        recorded: Collection[links.Link] | None = None,
    ) -> None:
        """Take the folders of a group, the reason for their relocation, and the recorded links of this home.

        Args:
            label: the name of the group: a tool, or the path of a folder as host.toml has it.
            places: the folders with their old paths, new paths and variables.
            root: the root on the volume.
            home: the home folder.
            journal: the journal of this run.
            progress: receives the progress of copies.
            claim: the reason why the folders should be on the volume.
            recorded: the recorded links of this home; None reads them from the root.
        """
        self.name = f"relocate {label}"
        self.places = places
        self.root = root
        self.home = home
        self.journal = journal
        self.progress = progress
        self.claim = claim
        self._links = recorded
        self._notes: list[str] = []

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        first = self.places[0] if self.places else None
        more = f", and {len(self.places) - 1} more" if len(self.places) > 1 else ""
        return f"move {first.source} to {first.target} and link it{more}" if first else "no folder to move"

    @preflight.limited_depth()
    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no deeper check)
        """Check each folder: its link, the link's target, and interrupted moves. Return the worst state."""
        if not self.places:
            return Check(State.OK, "this host has no such folder")
        checks = [self._check(place) for place in self.places]
        state = next(state for state in _WORST if any(check.state is state for check in checks))
        details = [check.detail for check in checks if check.state is state]
        more = f", and {len(details) - 1} more" if len(details) > 1 else ""
        notes = [check.fallback for check in checks if check.fallback] + self._notes
        return Check(state, details[0] + more, "; ".join(notes) or None)

    @preflight.limited_depth()
    def apply(self) -> None:
        """Make missing links to folders on the volume, move or merge real folders, or set variables instead."""
        can = volume_capabilities.ensure(self.root)
        mover = FolderMove(self.journal, self.progress, can)
        self._relink(mover)
        drifted = [self._effective(place) for place in self.places if self._check(place).state is State.DRIFTED]
        unlinkable = [place for place in drifted if _obstacle(place.source) is not None]
        pairs = [MovePair(place.source, place.target) for place in drifted if place not in unlinkable]
        is_copied = any(_is_copied(place) for place in drifted)
        rewritten = outgoing_links.make_absolute({pair.source: pair.target for pair in pairs}, self.journal)
        if rewritten:
            self._notes.append(_rewritten_note(rewritten))
        try:
            mover.run(pairs)
        finally:
            self._notes += dict.fromkeys(mover.kept_whole)
            if mover.conflicts:
                paths = ", ".join(mover.conflicts[:3]) + (", …" if len(mover.conflicts) > 3 else "")
                self._notes.append(
                    f"{len(mover.conflicts)} files differ between the merged folders; the older versions are at {paths}"
                )
        for place in unlinkable:
            self._set_variable(place, can)
        given_up = volume_capabilities.given_up(can)
        if given_up and is_copied:
            self._notes.append(f"the moved files lose what {self.root.path} does not keep: {', '.join(given_up)}")

    def linked(self) -> Iterator[links.Link]:
        """Yield the links of this step that exist and lead into the root, also those at parents of its folders."""
        for place in self.places:
            if link_target(place.source) == str(place.target):
                yield links.Link(place.source, place.target)
            else:
                yield from links.on_the_way(self.root, place.source, self.home)

    def _relink(self, mover: FolderMove) -> None:
        """Make the missing links to folders that are complete on the volume; a parent folder's link comes first."""
        while True:
            drifted = [self._effective(place) for place in self.places if self._check(place).state is State.DRIFTED]
            wiped = [pair for place in drifted if (pair := MovePair(place.source, place.target)).is_wiped]
            sources = {pair.source for pair in wiped}
            outer = [pair for pair in wiped if sources.isdisjoint(pair.source.parents)]
            if not outer:
                return
            mover.relink(outer)

    def _effective(self, place: RelocatedFolder) -> RelocatedFolder:
        """Return the folder with its present target: of its link, else as recorded, else as requested."""
        linked = links.folder_on(self.root, place.source)
        if linked is not None:
            return replace(place, target=linked)
        recorded = self._recorded.get(place.source)
        if recorded is not None and link_target(place.source) is None and recorded.is_dir():
            return replace(place, target=recorded)
        return place

    def _check(self, requested: RelocatedFolder) -> Check:
        place = self._effective(requested)
        source, target = place.source, place.target
        dangling = self._dangling_parent(source)
        if dangling is not None:
            return self._blocked_or_noted(
                f"{dangling} is a link to {link_target(dangling)}, which does not exist, so {source} leads nowhere. "
                f"Mount its volume, or remove the link: rm {dangling}"
            )
        destination = link_target(source)
        if destination is not None:
            check = self._check_link(place, destination)
            note = self._kept_link_note(place, requested.target)
            return replace(check, fallback=check.fallback or note) if check.state is State.OK else check
        if os.path.lexists(source):
            return self._check_real(place)
        if self._is_below_link(source) or self._is_same_name(source, target):
            return Check(State.OK, f"{source} is on the volume itself")
        if target.exists():
            return Check(State.DRIFTED, f"the link {source} is missing; its data is at {target}")
        return Check(State.DRIFTED, f"{source} does not exist yet")

    def _kept_link_note(self, place: RelocatedFolder, requested: Path) -> str | None:
        """Return a note if a link leads to another folder in the root than the requested one; else None.

        There is a note if the requested folder has files, or if the claim is LISTED and the folder belongs to no tool.
        """
        if place.target == requested:
            return None
        is_filled = requested.is_dir() and any(requested.iterdir())
        if is_filled or (self.claim is Claim.LISTED and place.variable is None):
            unused = f"; the files at {requested} are not used" if is_filled else f", and not to {requested}"
            return f"{place.source} stays a link to {place.target}{unused}"
        return None

    def _check_link(self, place: RelocatedFolder, destination: str) -> Check:
        source, target = place.source, place.target
        if links.folder_on(self.root, source) is not None:
            if destination == str(target) and MovePair(source, target).unfinished:
                return Check(State.DRIFTED, f"the move of {source} was interrupted; its data is at {target}")
            return Check(State.OK, f"{source} -> {target}")
        if self.claim is not Claim.UNKNOWN and not source.exists():
            if destination == str(target):
                return Check(State.DRIFTED, f"{source} is a link to {target}, which does not exist")
            if destination.startswith(f"{self.root.path}{os.sep}") or destination in self._former_targets(target):
                return Check(State.DRIFTED, f"{source} is a link to {destination}, it should be a link to {target}")
        return self._check_foreign_link(source, destination)

    def _check_foreign_link(self, source: Path, destination: str) -> Check:
        """Check a link that leads out of the root. The link stays; BLOCKED if setup cannot continue with it."""
        other = linked_root(source)
        if other is not None:
            return self._blocked_or_noted(
                f"{source} is a link to {destination}, on another root. "
                f"Name the other root: --root {other.path} (make: ROOT={other.path})"
            )
        if not source.exists():
            return self._blocked_or_noted(
                f"{source} is a link to {destination}, which does not exist. Mount its volume, or remove the link: "
                f"rm {source}"
            )
        note = f"{source} is a link to {destination}, which firstlight did not make, so it is left alone"
        if self.claim is Claim.LISTED:
            return Check(
                State.BLOCKED,
                f"{note}. Remove it from `relocate` in host.toml, or remove the link, then run again: rm {source}",
            )
        return Check(State.OK, note, note)

    def _blocked_or_noted(self, text: str) -> Check:
        """Return BLOCKED if the claim is LISTED or DEFAULT; else OK with the text as a note."""
        if self.claim in {Claim.LISTED, Claim.DEFAULT}:
            return Check(State.BLOCKED, text)
        return Check(State.OK, text, text)

    def _check_real(self, place: RelocatedFolder) -> Check:
        source, target = place.source, place.target
        if not source.is_dir():
            return self._blocked_or_noted(f"{source} is a file, not a folder. Look at the file: ls -l {source}")
        if source.resolve().is_relative_to(self.root.path.resolve()):
            return Check(State.OK, f"{source} is on the volume itself")
        if self._may_be_another_home(source):
            inside = os.path.relpath(target, self.root.path)
            command = ["provision", "relocate", str(source), "--to", inside, "--root", str(self.root.path)]
            note = f"{source} is recorded as a link to {target}, but is a folder of this home, so it is left alone"
            return Check(State.OK, note, f"{note}; to merge it: {shlex.join(command)}")
        return self._check_movable(place)

    def _may_be_another_home(self, source: Path) -> bool:
        """Return whether a real folder may belong to a home that never had the recorded link.

        By the record on the volume, a wiped home cannot be distinguished from another home with the same host name and
        path. The record in the home lists the links that this home itself has had.
        """
        if self.claim is Claim.RECORDED:
            return str(source) not in self._linked_before and any(source.iterdir())
        return self.claim is Claim.UNKNOWN

    def _check_movable(self, place: RelocatedFolder) -> Check:
        source, target = place.source, place.target
        if (destination := link_target(target)) is not None and destination != str(target):
            return Check(State.BLOCKED, f"{target} is a link to {destination}. Look at the link: ls -l {target}")
        obstacle = _obstacle(source)
        if obstacle is not None:
            return self._check_variable(place, obstacle)
        preflight.require_unused([source])
        if target.is_dir() and any(target.iterdir()):
            return _check_merge(source, target)
        return Check(State.DRIFTED, f"{source} is a real folder, to be moved to {target}")

    def _check_variable(self, place: RelocatedFolder, obstacle: str) -> Check:
        if place.variable is None:
            return Check(State.BLOCKED, f"{place.source} cannot become a link: {obstacle}. Fix this, then run again.")
        note = f"{place.source} cannot become a link ({obstacle}); {place.variable}={place.target} is used instead"
        if variables.read(self.root).get(place.variable) == str(place.target):
            return Check(State.OK, note, f"{note}. To set the variable in a shell: . {variables.shell_file(self.root)}")
        return Check(State.DRIFTED, note)

    def _set_variable(self, place: RelocatedFolder, can: Capabilities) -> None:
        """Copy a folder that cannot be replaced by a link, and set the variable of its tool to the copy's path."""
        assert place.variable is not None  # noqa: S101 (`_check_variable` blocks a folder without a variable)
        make_folders(place.target, self.journal)
        with OpenDir.at(place.source) as source, OpenDir.at(place.target) as target:
            if tree.is_empty(target):
                preflight.require_storable(tree.measure(source), can, place.target)
                TreeCopy([(source, target)], lambda count, unit: self.progress(count, 0, unit), kept=can.kept).run()
                rows = outgoing_links.outgoing_links(source, {source.path: target.path})
                outgoing_links.set_texts(target, {row.path: row.text for row in rows}, can.kept)
                if rows:
                    self._notes.append(_rewritten_note([str(place.target / row.path) for row in rows]))
        variables.set_value(self.root, place.variable, str(place.target), self.journal)

    def _is_below_link(self, source: Path) -> bool:
        """Return whether a parent folder is a link into the root, so that a tool makes the folder on the volume."""
        return any(link.path != source for link in links.on_the_way(self.root, source, self.home))

    def _is_same_name(self, source: Path, target: Path) -> bool:
        with contextlib.suppress(OSError):
            return source.name == target.name and source.parent.samefile(target.parent)
        return False

    def _dangling_parent(self, source: Path) -> Path | None:
        """Return the nearest parent folder below the home that is a dangling link, or None."""
        parents = [parent for parent in source.parents if parent.is_relative_to(self.home)]
        return next((parent for parent in parents if parent.is_symlink() and not parent.exists()), None)

    def _former_targets(self, target: Path) -> set[str]:
        """Return the texts that a link to the folder `target` had when the root was at other paths, by the record."""
        if not target.is_relative_to(self.root.path):
            return set()
        inside = target.relative_to(self.root.path)
        return {str(Path(row.root) / inside) for row in links.read(self.root).rows}

    @functools.cached_property
    def _linked_before(self) -> set[str]:
        entry = home_record.used(self.home, self.root)
        return set(entry.paths) if entry is not None else set()

    @functools.cached_property
    def _recorded(self) -> dict[Path, Path]:
        """Return {path: target} of the recorded links of this home."""
        recorded = links.recorded(self.root, current(self.home)) if self._links is None else self._links
        return {link.path: link.target for link in recorded}


def _check_merge(source: Path, target: Path) -> Check:
    with OpenDir.at(source) as original, OpenDir.at(target) as other:
        conflict = whole_folders.conflict(original, other)
    if conflict is not None:
        return Check(State.BLOCKED, conflict)
    return Check(State.DRIFTED, f"{source} is a real folder again, to be merged into {target}")


def _rewritten_note(links: Sequence[str]) -> str:
    paths = ", ".join(links[:3]) + (", …" if len(links) > 3 else "")
    return f"{len(links)} relative links that lead out of the folder are absolute now, to the same places: {paths}"


def _is_copied(place: RelocatedFolder) -> bool:
    """Return whether a real folder lies on another file system than its target, so that a move has to copy it."""
    source, target = place.source, capabilities.existing(place.target)
    return link_target(source) is None and source.is_dir() and source.stat().st_dev != target.stat().st_dev


def _obstacle(source: Path) -> str | None:
    """Return the reason why a link cannot replace this folder, or None."""
    if not os.path.lexists(source) or link_target(source) is not None:
        return None
    if not os.access(source.parent, os.W_OK | os.X_OK):
        return f"{source.parent} is not writable"
    if source.stat().st_dev != source.parent.stat().st_dev:
        return "it is a mount point"
    return None
