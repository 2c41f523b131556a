"""The links that this volume's hosts should have, and the script that restores them with nothing but a POSIX shell."""

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
    """One link: its path on the host, and where it leads."""

    path: Path
    target: Path


def recorded(root: Root, home: Path) -> list[Link]:
    """The links on record, their paths in this home and on this root.

    Raises:
        BlockedError: the record cannot be read.
    """
    try:
        kept = json.loads(root.links.read_text(encoding="ascii"))
        rows = [(str(row["path"]), str(row["target"])) for row in kept["links"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, KeyError, TypeError):
        raise BlockedError(f"{root.links} cannot be read. Look at it: cat {root.links}; or move it away.") from None
    return sorted(Link(_full(path, home), root.path / target) for path, target in rows)


def _full(path: str, home: Path) -> Path:
    return home / path[2:] if path.startswith("~/") else Path(path)


def relative_to_home(path: Path, home: Path) -> str:
    """Return a path as ~/… where it lies below the home."""
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)
