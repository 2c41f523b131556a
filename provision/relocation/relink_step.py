"""Provides the step that updates the record of links on the volume and the scripts that restore the links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from provision.core.step import Check, State
from provision.volume import links, relink
from provision.volume.journal_acts import LinkRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.volume.journal import Journal


class LinkStep(Protocol):
    """Describe a step that makes links."""

    def linked(self) -> Iterator[links.Link]:
        """Yield the links of this step that are in place."""


class RecordStep:
    """Keeps links.json, relink.sh and relink.ps1 up to date.

    They list the links in place and those of earlier runs, because a wipe removes links that the host still needs.
    """

    name = "relink.sh"
    essential = False
    local = True

    def __init__(self, root: Root, home: Path, steps: Sequence[LinkStep], journal: Journal) -> None:
        """Take the steps whose links are recorded."""
        self.root = root
        self.home = home
        self.steps = steps
        self.journal = journal

    def describe(self) -> str:
        """Return the line of the plan."""
        return f"write {self.root.relink}, a shell script that restores the links"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (each file is read completely)
        """Compare the files with the links that they should list."""
        expected = self._links()
        if not expected and not self.root.links.exists():
            return Check(State.OK, "there are no links to restore")
        for path, content in relink.files(self.root, self.home, expected).items():
            if not path.exists() or path.read_bytes() != content:
                return Check(State.DRIFTED, f"{path} does not list the current links")
        return Check(State.OK, f"{len(expected)} links; restore them after a wipe: sh {self.root.relink}")

    def apply(self) -> None:
        """Write the record and the two scripts."""
        expected = self._links()
        for link in expected - set(links.recorded(self.root, self.home)):
            self.journal.record(LinkRecord(link.path, link.target))
        relink.write(self.root, self.home, expected)

    def _links(self) -> set[links.Link]:
        in_place = {link for step in self.steps for link in step.linked()}
        paths = {link.path for link in in_place}
        return in_place | {link for link in links.recorded(self.root, self.home) if link.path not in paths}
