"""Reads and changes the record of symbolic links into the volume, links.json; each link has an owner: host and home."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.fs import records
from provision.fs.open_dir import link_target
from provision.volume.owner import Owner

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from provision.core.layout import Root

# A record of schema 1 has one root for all links and no owners; its links are read as links of an unknown owner.
SCHEMA = 2


@dataclass(frozen=True, order=True)
class Link:
    """Describe one symbolic link into the volume by its path and its target, both absolute."""

    path: Path
    target: Path


@dataclass(frozen=True)
class LinkRow:
    """Hold one row of links.json: a link with its owner.

    `owner` is None if the owner is unknown. `path` is ~/… in the owner's home, else absolute. `target` is relative to
    the root. `root` is the path that the root had when the link was recorded.
    """

    owner: Owner | None
    root: str
    path: str
    target: str

    @property
    def recorded_target(self) -> str:
        """Return the target that the link had when it was recorded, as an absolute path."""
        return self.root if self.target == "." else f"{self.root}{os.sep}{self.target}"

    def link(self, root: Root, home: Path) -> Link:
        """Return the link with absolute paths: ~ is `home`, and the target lies in the root at its present path."""
        path = home / self.path[2:] if self.path.startswith("~/") else Path(self.path)
        return Link(path, root.path / self.target)

    def to_dict(self) -> dict[str, str]:
        """Return the row as a dict for JSON."""
        owner = {"host": self.owner.host, "home": self.owner.home} if self.owner else {}
        return {**owner, "root": self.root, "path": self.path, "target": self.target}


@dataclass(frozen=True)
class LinkFile:
    """Hold the content of links.json: the rows, and `adopted`: (earlier owner, owner that adopted its links)."""

    rows: tuple[LinkRow, ...] = ()
    adopted: tuple[tuple[Owner, Owner], ...] = ()

    def of(self, owner: Owner | None) -> list[LinkRow]:
        """Return the rows of an owner; None stands for the unknown owner."""
        return [row for row in self.rows if row.owner == owner]

    def with_links(self, owner: Owner, root: Root, links: Iterable[Link], adopt: Owner | None = None) -> LinkFile:
        """Return the content in which `links` replace the rows of one owner; the rows of the other owners stay.

        A row of an unknown owner is dropped if one of the links has its path.

        Args:
            owner: the owner of the links.
            root: the root, at its current path.
            links: all links of the owner, with adopted ones.
            adopt: the owner whose links are adopted, or None. Its rows are dropped, because `links` contains them.
        """
        own = [_row(owner, root, link) for link in set(links)]
        paths = {row.path for row in own}
        others = [
            row
            for row in self.rows
            if row.owner not in {owner, adopt or owner} and not (row.owner is None and row.path in paths)
        ]
        # An adopted owner that records links again is still in use, so it is no longer listed as adopted.
        adopted = {old: new for old, new in self.adopted if old != owner}
        if adopt is not None and adopt != owner:
            adopted = {old: owner if new == adopt else new for old, new in adopted.items()} | {adopt: owner}
        rows = sorted([*others, *own], key=_order)
        return replace(self, rows=tuple(rows), adopted=tuple(sorted(adopted.items())))

    def to_json(self) -> bytes:
        """Return the content of links.json as text.

        The text depends on the rows alone, so that two hosts in turn do not change the file again and again.
        """
        adopted = [
            {"host": old.host, "home": old.home, "by": {"host": new.host, "home": new.home}}
            for old, new in self.adopted
        ]
        content = {"schema": SCHEMA, "links": [row.to_dict() for row in self.rows], "adopted": adopted}
        return (json.dumps(content, indent=1) + "\n").encode("ascii")


def read(root: Root) -> LinkFile:
    """Return the content of links.json of any schema; without the file, an empty record.

    Raises:
        BlockedError: the record cannot be read.
    """
    try:
        content = records.read_state(root.links)
        made_at = content.get("root", str(root.path))
        rows = [
            _possible(LinkRow(_owner(row), _text(row.get("root", made_at)), _text(row["path"]), _text(row["target"])))
            for row in records.rows(content["links"])
        ]
        adopted = records.rows(content.get("adopted", []))
        pairs = [(_owner(row), _owner(records.table(row["by"]))) for row in adopted]
    except (FileNotFoundError, NotADirectoryError):
        return LinkFile()
    except (ValueError, KeyError):
        raise BlockedError(
            f"{root.links} cannot be read. Look at this file: cat {root.links}; or move it away."
        ) from None
    return LinkFile(tuple(rows), tuple((old, new) for old, new in pairs if old and new))


def recorded(root: Root, owner: Owner) -> list[Link]:
    """Return the recorded links of an owner, sorted; their targets lie in the root at its present path.

    Raises:
        BlockedError: the record cannot be read.
    """
    return sorted(row.link(root, Path(owner.home)) for row in read(root).of(owner))


def own_owners(root: Root, owner: Owner) -> frozenset[Owner]:
    """Return an owner and those that it has adopted.

    Raises:
        BlockedError: the record cannot be read.
    """
    return frozenset({owner, *(old for old, new in read(root).adopted if new == owner)})


def of_unknown_owner(root: Root, home: Path) -> list[Link]:
    """Return the recorded links of an unknown owner, sorted; `home` replaces ~ in their paths.

    Raises:
        BlockedError: the record cannot be read.
    """
    return sorted(row.link(root, home) for row in read(root).of(None))


def folder_on(root: Root, path: Path) -> Path | None:
    """Return the folder in the root to which a link leads, as a path that begins with the path of the root.

    The text of the link may be relative, lead through another link, or lead through another mount point of the volume.

    Returns:
        The folder; None if `path` is not a link, is a dangling link, or leads out of the root.
    """
    text = link_target(path)
    try:
        real = path.resolve(strict=True) if text is not None else None
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return None
    if text is None or real is None or not real.is_dir():
        return None
    top = root.path.resolve()
    if real.is_relative_to(top):
        direct = Path(os.path.normpath(path.parent / text))
        return direct if direct.is_relative_to(root.path) else root.path / real.relative_to(top)
    for parent in (real, *real.parents):
        marker = parent / root.marker.relative_to(root.path)
        if marker.exists() and root.marker.exists() and marker.samefile(root.marker):
            return root.path / real.relative_to(parent)
    return None


def on_the_way(root: Root, path: Path, home: Path) -> Iterator[Link]:
    """Yield the links into the root at a path, and at those of its parent folders that lie in the home."""
    parents = [parent for parent in path.parents if parent != home and parent.is_relative_to(home)]
    for step in (*reversed(parents), path):
        target = folder_on(root, step)
        if target is not None:
            yield Link(step, target)


def _row(owner: Owner, root: Root, link: Link) -> LinkRow:
    home, path = Path(owner.home), link.path
    shown = f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)
    target = os.path.relpath(link.target, root.path).replace(os.sep, "/")
    return LinkRow(owner, str(root.path), shown, target)


def _order(row: LinkRow) -> tuple[str, ...]:
    owner = (row.owner.host, row.owner.home) if row.owner else ("", "")
    return (*owner, row.path, row.target)


def _possible(row: LinkRow) -> LinkRow:
    """Return a link that firstlight can have recorded: its target lies in the root, and its path has no `..`.

    Raises:
        ValueError: another program has written the row.
    """
    target, path = PurePosixPath(row.target), PurePosixPath(row.path)
    if target.is_absolute() or ".." in (*target.parts, *path.parts) or "\0" in row.target + row.path:
        raise ValueError("not a link that firstlight makes")
    return row


def _text(value: object) -> str:
    return records.typed(value, str)


def _owner(row: Mapping[str, object]) -> Owner | None:
    host, home = row.get("host"), row.get("home")
    return Owner(host, home) if isinstance(host, str) and isinstance(home, str) else None
