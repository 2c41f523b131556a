"""The marker of a root, which proves that the volume is mounted, and the step that makes it."""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError
from provision.core.step import Check, State
from provision.fs import durable
from provision.fs.atomic import write_atomic
from provision.volume.journal_acts import VolumeMark

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.volume.journal import Journal

SCHEMA = 1


def read_marker(root: Root) -> dict[str, object] | None:
    """Return the marker's content, or None where there is no marker.

    Raises:
        BlockedError: the marker is there, but firstlight cannot read it.
    """
    try:
        marker = json.loads(root.marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, UnicodeDecodeError):
        marker = None
    if not isinstance(marker, dict) or marker.get("schema") != SCHEMA or "id" not in marker:
        raise BlockedError(f"{root.marker} is not a marker that firstlight can read. Look at it: cat {root.marker}")
    return marker


def require(root: Root) -> None:
    """Check that the volume is mounted.

    Raises:
        BlockedError: the root has no marker, so the volume is not mounted or was never set up.
    """
    if read_marker(root) is None:
        raise BlockedError(
            f"{root.path} has no .firstlight marker: it is not mounted, or was never set up. "
            f"Mount it and run `{layout.next_command('repair')}`, or run `{layout.next_command('setup')}`.",
            kind="not-mounted",
        )


class VolumeStep:
    """Ensure that the root exists and has its marker."""

    name = "volume"
    essential = True
    local = False  # repair must not make a marker, since a missing marker means that the volume is not mounted

    def __init__(self, root: Root, links: Sequence[Path], journal: Journal, warning: str | None = None) -> None:
        """Store the root, the home's links that should lead into it, and a warning for the user about the root."""
        self.warning = warning
        self.root = root
        self.links = links
        self.journal = journal

    def describe(self) -> str:
        """Return the plan's line for this step."""
        return f"make the folder {self.root.path} with the .firstlight marker"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (there is nothing deeper to see)
        """Check the marker. Without a marker, a link into the root shows that the volume is only not mounted."""
        marker = read_marker(self.root)
        if marker is not None:
            return Check(State.OK, f"{self.root.path}, marked {marker.get('created', 'earlier')}", self.warning)
        links = [link for link in self.links if self._is_link_into_root(link)]
        if links:
            return Check(
                State.BLOCKED,
                f"{self.root.path} is not mounted (no .firstlight marker, yet {links[0]} leads into it). "
                f"Mount it, then run `{layout.next_command('repair')}`.",
            )
        if self.root.path.exists() and not self.root.path.is_dir():
            return Check(State.BLOCKED, f"{self.root.path} is not a folder. Give another --root.")
        return Check(State.DRIFTED, f"{self.root.path} has no marker yet")

    def apply(self) -> None:
        """Make the folder and its marker."""
        durable.make_folders(self.root.state)
        self.journal.record(VolumeMark(self.root.path))
        created = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
        marker = {"schema": SCHEMA, "id": uuid.uuid4().hex, "created": created}
        write_atomic(self.root.marker, json.dumps(marker, indent=1) + "\n")

    def _is_link_into_root(self, link: Path) -> bool:
        try:
            target = str(link.readlink())
        except OSError:
            return False
        return target == str(self.root.path) or target.startswith(f"{self.root.path}{os.sep}")
