"""Provides the step that updates the record of links on the volume and the scripts that restore the links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from provision.core.step import Check, State
from provision.volume import link_files, links
from provision.volume.adoption import Adoption
from provision.volume.journal_acts import LinkRecord
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.volume.journal import Journal


class LinkStep(Protocol):
    """Describe a setup step that makes links into the root."""

    def linked(self) -> Iterator[links.Link]:
        """Yield the links of this step that exist and lead into the root."""


class LinksByHand:
    """Finds links from caches to the root that the user has made, so that they are recorded and survive a wipe."""

    def __init__(self, paths: Sequence[Path], root: Root, home: Path) -> None:
        """Take the paths of caches; links at their parent folders below the home are found, too."""
        self.paths = paths
        self.root = root
        self.home = home

    def linked(self) -> Iterator[links.Link]:
        """Yield the links that lead to a folder in the root."""
        for path in self.paths:
            yield from links.on_the_way(self.root, path, self.home)


class RecordStep:
    """Keeps the record of links, links.json, and the scripts relink.sh and relink.ps1 up to date.

    The three files list the links of this home that exist now, and those that earlier runs recorded, because a wipe
    removes links that the home still needs. The recorded links of other owners stay unchanged.
    """

    name = "relink.sh"
    essential = False
    local = True

    def __init__(
        self, root: Root, home: Path, steps: Sequence[LinkStep], journal: Journal, adoption: Adoption | None = None
    ) -> None:
        """Take the steps whose links are recorded, and the adoption of another owner's links (None: no adoption)."""
        self.root = root
        self.home = home
        self.steps = steps
        self.journal = journal
        self.adoption = adoption or Adoption()

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        return f"write {self.root.relink}, a shell script that restores the links"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (each file is read completely)
        """Check that the three files, and the record in the home, list the links that they should list."""
        expected = self._links()
        if not expected and not self.root.links.exists():
            return Check(State.OK, "there are no links to restore")
        for path, content in link_files.files(self.root, self.home, expected, self.adoption.owner).items():
            if not path.exists() or path.read_bytes() != content:
                return Check(State.DRIFTED, f"{path} does not list the current links", self.adoption.note)
        return Check(
            State.OK, f"{len(expected)} links; restore them after a wipe: sh {self.root.relink}", self.adoption.note
        )

    def apply(self) -> None:
        """Write the record and the two scripts."""
        expected = self._links()
        for link in expected - set(links.recorded(self.root, current(self.home))):
            self.journal.record(LinkRecord(link.path, link.target))
        link_files.write(self.root, self.home, expected, self.adoption.owner)

    def _links(self) -> set[links.Link]:
        in_place = {link for step in self.steps for link in step.linked()}
        paths = {link.path for link in in_place}
        recorded = self.adoption.with_links(self.root, current(self.home))
        return in_place | {link for link in recorded if link.path not in paths}
