"""Reads the marker of a root, which proves that the volume is mounted, and provides the step that makes the marker."""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError
from provision.core.step import Check, State
from provision.fs import records
from provision.fs.atomic import write_atomic
from provision.volume import absence, home_record, trust, volume_capabilities
from provision.volume.changes import make_folders
from provision.volume.journal_acts import VolumeMark

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.fs.capabilities import Capabilities
    from provision.volume.journal import Journal

SCHEMA = 1


def read_marker(root: Root) -> dict[str, object] | None:
    """Return the content of the root's marker, with the keys `id` and `created`; None if there is no marker.

    Raises:
        BlockedError: the marker exists, but cannot be read or is damaged.
    """
    try:
        marker = records.read_state(root.marker)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        marker = {}
    if marker.get("schema") != SCHEMA or not isinstance(marker.get("id"), str):
        raise BlockedError(f"{root.marker} is not a readable marker. Look at the file: cat {root.marker}")
    return marker


def require(root: Root) -> None:
    """Check that the volume is mounted.

    Raises:
        BlockedError: the root has no marker, so the volume is not mounted or was never set up.
    """
    if read_marker(root) is None:
        raise BlockedError(
            f"{root.path} has no .firstlight marker: the volume is not mounted, or was never set up. "
            f"Mount the volume and run `{layout.next_command('repair')}`, or run `{layout.next_command('setup')}`.",
            kind="not-mounted",
        )


class VolumeStep:
    """Makes the root and its marker, if they do not exist."""

    name = "volume"
    essential = True
    local = False  # repair must not make a marker, since a missing marker means that the volume is not mounted

    def __init__(
        self,
        root: Root,
        links: Sequence[Path],
        journal: Journal,
        warning: str | None = None,
        home: Path | None = None,
        *,
        for_environment: bool = False,
    ) -> None:
        """Store the root and the paths that may be links into the root.

        Args:
            root: the root that gets the marker.
            links: the paths of links that should lead into the root.
            journal: the journal of this run.
            warning: a warning for the user about the choice of the root, or None.
            home: the home folder, in whose record the root is listed; None: no record in a home is written.
            for_environment: a new root must lie on a file system on which an environment works.
        """
        self.for_environment = for_environment
        self.warning = warning
        self.home = home
        self.root = root
        self.links = links
        self.journal = journal

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        return f"make the folder {self.root.path} with the .firstlight marker, and record it in the home"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (there is nothing deeper to see)
        """Check the marker; BLOCKED if there is none and the home has a sign that the volume is not mounted."""
        marker = read_marker(self.root)
        if marker is not None:
            if self._home_to_record(str(marker["id"])) is not None:
                return Check(State.DRIFTED, f"{self.root.path} is not in the record of this home", self.warning)
            return Check(State.OK, f"{self.root.path}, marked {marker.get('created', 'earlier')}", self.warning)
        sign = absence.sign(self.root, self.home, self.links)
        if sign is not None:
            return Check(
                State.BLOCKED,
                f"{self.root.path} is not mounted ({sign.fact}). If the volume is gone for good, run: {sign.remedy}. "
                f"Else mount it, then run `{layout.next_command('repair')}`.",
            )
        if self.root.path.exists() and not self.root.path.is_dir():
            return Check(State.BLOCKED, f"{self.root.path} is not a folder. Give another --root.")
        if obstacle := self._obstacle(volume_capabilities.known(self.root)):
            return Check(State.BLOCKED, obstacle)
        return Check(State.DRIFTED, f"{self.root.path} has no marker yet")

    def apply(self) -> None:
        """Make the root and its marker, record the features of its file system, and list the root in the home's record.

        Raises:
            BlockedError: setup cannot work on the file system; nothing was written.
        """
        marker = read_marker(self.root)
        if marker is None:
            if obstacle := self._obstacle(volume_capabilities.ensure(self.root)):
                raise BlockedError(obstacle)
            trust.make_state_folder(self.root)
            self.journal.record(VolumeMark(self.root.path))
            created = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
            marker = {"schema": SCHEMA, "id": uuid.uuid4().hex, "created": created}
            write_atomic(self.root.marker, json.dumps(marker, indent=1) + "\n")
            volume_capabilities.ensure(self.root)
        home = self._home_to_record(str(marker["id"]))
        if home is not None:
            make_folders(home_record.record_file(home).parent, self.journal)
            home_record.add_root(home, self.root, str(marker["id"]))

    def _obstacle(self, can: Capabilities) -> str | None:
        """Return the reason why setup cannot use this file system, or None."""
        if not can.writable:
            return None  # the error of the system, raised later, has more details
        return volume_capabilities.environment_obstacle(self.root, can) if self.for_environment else None

    def _home_to_record(self, volume: str) -> Path | None:
        """Return the home if the root must be added to its record; None if it is listed, or the home is read-only."""
        home = self.home
        if home is None or home_record.used(home, self.root, volume) is not None or not home_record.can_write(home):
            return None
        return home
