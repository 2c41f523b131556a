"""The persistent folder: its marker, and the guard that tells it from an unmounted one."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import uuid
from typing import TYPE_CHECKING

from provision.errors import BlockedError
from provision.step import Check, State

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.journal import Journal
    from provision.paths import Root

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
            "Mount it and run `make repair`, or run `make setup`.",
            kind="not-mounted",
        )


def keep_backup(path: Path, after: bytes | None, journal: Journal) -> None:
    """Keep the bytes and mode of a file of the user's that is about to become `after` (None: to be taken away)."""
    journal.record("backup", path=path)
    kept = None
    mode = None
    if path.exists():
        kept = journal.backup / f"file-{uuid.uuid4().hex[:8]}"
        write_atomic(kept, path.read_bytes(), private=True)
        mode = stat.S_IMODE(path.stat().st_mode)
    digest = None if after is None else hashlib.sha256(after).hexdigest()
    journal.record("file", path=path, backup=kept, mode=mode, sha256=digest)


def write_atomic(
    path: Path, content: str | bytes, *, like: os.stat_result | None = None, private: bool = False
) -> None:
    """Write a file so that a reader, or a crash, sees the old bytes or the new ones, never a part.

    Args:
        path: the file; the folders above it are made.
        content: what it shall hold.
        like: whose mode and owner it shall have, else the usual ones.
        private: nobody else may read it, at no time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        narrow = private or like is not None
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600 if narrow else 0o666)) as file:
            file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if like is not None:
            if hasattr(os, "chown") and like.st_uid != os.geteuid():
                os.chown(part, like.st_uid, like.st_gid)
            part.chmod(stat.S_IMODE(like.st_mode))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
                "Mount it, then run `make repair`.",
            )
        if self.root.path.exists() and not self.root.path.is_dir():
            return Check(State.BLOCKED, f"{self.root.path} is not a folder. Give another --root.")
        return Check(State.DRIFTED, f"{self.root.path} bears no marker yet")

    def apply(self) -> None:
        """Make the folder and its marker."""
        self.root.state.mkdir(parents=True, exist_ok=True)
        self.journal.record("mark", volume=self.root.path)
        created = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
        marker = {"schema": SCHEMA, "id": uuid.uuid4().hex, "created": created}
        write_atomic(self.root.marker, json.dumps(marker, indent=1) + "\n")

    def _leads_here(self, link: Path) -> bool:
        try:
            target = str(link.readlink())
        except OSError:
            return False
        return target == str(self.root.path) or target.startswith(f"{self.root.path}{os.sep}")
