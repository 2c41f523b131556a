"""The record of the symbolic links that a host should have into the volume."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError

if TYPE_CHECKING:
    from provision.core.layout import Root

SCHEMA = 1


@dataclass(frozen=True, order=True)
class Link:
    """Describe one symbolic link: its path on the host and its target on the volume."""

    path: Path
    target: Path


def recorded(root: Root, home: Path) -> list[Link]:
    """Return the recorded links, sorted, with paths in this home and targets on this root.

    Raises:
        BlockedError: the record cannot be read.
    """
    try:
        content = json.loads(root.links.read_text(encoding="ascii"))
        rows = [(str(row["path"]), str(row["target"])) for row in content["links"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, KeyError, TypeError):
        raise BlockedError(f"{root.links} cannot be read. Look at it: cat {root.links}; or move it away.") from None
    return sorted(Link(_absolute(path, home), root.path / target) for path, target in rows)


def _absolute(path: str, home: Path) -> Path:
    return home / path[2:] if path.startswith("~/") else Path(path)


def relative_to_home(path: Path, home: Path) -> str:
    """Return a path below the home as ~/…, and any other path unchanged."""
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)
