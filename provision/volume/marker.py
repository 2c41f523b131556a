"""The persistent folder: its marker, and the guard that tells it from an unmounted one."""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError
from provision.core.step import Check, State
from provision.fs.atomic import write_atomic
from provision.volume.journal_acts import VolumeMark

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.volume.journal import Journal

SCHEMA = 1


def read_marker(root: Root) -> dict[str, object] | None:
    """The marker's content, or None where there is none.

    Raises:
        BlockedError: it is there and is not ours.
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
    """The volume is there.

    Raises:
        BlockedError: its marker is not: it is not mounted, or was never set up.
    """
    if read_marker(root) is None:
        raise BlockedError(
            f"{root.path} bears no .firstlight marker: it is not mounted, or was never set up. "
            f"Mount it and run `{layout.next_command('repair')}`, or run `{layout.next_command('setup')}`.",
            kind="not-mounted",
        )


class VolumeStep:
    """The root exists, can be written, and bears the marker."""

    name = "volume"
    essential = True
    local = False  # a repair never makes a marker: a volume without one is not mounted

    def __init__(self, root: Root, links: Sequence[Path], journal: Journal, warning: str | None = None) -> None:
        """Take the root, the links of this home that should lead into it, and what its owner should know of it."""
        self.warning = warning
        self.root = root
        self.links = links
        self.journal = journal

    def describe(self) -> str:
        """The plan's line."""
        return f"make {self.root.path} the persistent folder and mark it"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (there is nothing deeper to see)
        """Look for the marker, and for signs that the volume is only absent."""
        marker = read_marker(self.root)
        if marker is not None:
            return Check(State.OK, f"{self.root.path}, marked {marker.get('created', 'earlier')}", self.warning)
        pointing = [link for link in self.links if self._leads_here(link)]
        if pointing:
            return Check(
                State.BLOCKED,
                f"{self.root.path} is not mounted (no .firstlight marker, yet {pointing[0]} leads into it). "
                f"Mount it, then run `{layout.next_command('repair')}`.",
            )
        if self.root.path.exists() and not self.root.path.is_dir():
            return Check(State.BLOCKED, f"{self.root.path} is not a folder. Give another --root.")
        return Check(State.DRIFTED, f"{self.root.path} bears no marker yet")

    def apply(self) -> None:
        """Make the folder and its marker."""
        self.root.state.mkdir(parents=True, exist_ok=True)
        self.journal.record(VolumeMark(self.root.path))
        created = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
        marker = {"schema": SCHEMA, "id": uuid.uuid4().hex, "created": created}
        write_atomic(self.root.marker, json.dumps(marker, indent=1) + "\n")

    def _leads_here(self, link: Path) -> bool:
        try:
            target = str(link.readlink())
        except OSError:
            return False
        return target == str(self.root.path) or target.startswith(f"{self.root.path}{os.sep}")
