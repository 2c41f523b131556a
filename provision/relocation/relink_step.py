"""The step that keeps the record of links, and the scripts that restore them, true to the links that stand."""

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


class Linking(Protocol):
    """A step that makes links."""

    def linked(self) -> Iterator[links.Link]:
        """Those of its links that stand."""


class RecordStep:
    """links.json, relink.sh and relink.ps1 hold every link that stands, and every one that once stood."""

    name = "relink.sh"
    essential = False
    local = True

    def __init__(self, root: Root, home: Path, steps: Sequence[Linking], journal: Journal) -> None:
        """Take the steps whose links are put on record."""
        self.root = root
        self.home = home
        self.steps = steps
        self.journal = journal

    def describe(self) -> str:
        """The plan's line."""
        return f"write {self.root.relink}, which restores the links with nothing but sh"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (the files are always read whole)
        """Compare the files with what they should hold."""
        wanted = self._wanted()
        if not wanted and not self.root.links.exists():
            return Check(State.OK, "no link is to be restored")
        for path, content in relink.files(self.root, self.home, wanted).items():
            if not path.exists() or path.read_bytes() != content:
                return Check(State.DRIFTED, f"{path} does not hold the links as they are")
        return Check(State.OK, f"{len(wanted)} links; after a wipe: sh {self.root.relink}")

    def apply(self) -> None:
        """Write them."""
        wanted = self._wanted()
        for link in wanted - set(links.recorded(self.root, self.home)):
            self.journal.record(LinkRecord(link.path, link.target))
        relink.write(self.root, self.home, wanted)

    def _wanted(self) -> set[links.Link]:
        standing = {link for step in self.steps for link in step.linked()}
        paths = {link.path for link in standing}
        return standing | {link for link in links.recorded(self.root, self.home) if link.path not in paths}
