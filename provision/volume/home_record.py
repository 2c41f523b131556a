"""Reads and writes the record in the home: the roots that this home has used, and the home's links into them.

The record of links on the volume cannot be read while the volume is not mounted. The record in the home then shows that
a volume is missing. A missing or damaged record in the home counts as empty.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from provision.fs import capabilities, records
from provision.fs.atomic import write_atomic
from provision.volume.links import folder_on

if TYPE_CHECKING:
    from collections.abc import Iterable

    from provision.core.layout import Root
    from provision.volume.links import Link

SCHEMA = 1
_NEEDED_BYTES, _NEEDED_INODES = 1 << 16, 8  # for the record, its temporary file and the folders above it


@dataclass(frozen=True)
class UsedRoot:
    """Describe one root that the home has used.

    `path` is the path of the root, and `volume` the id in its marker. `mount` is the mount point of the root's file
    system; None if the home lies on the same file system. `paths` are the paths of the links into the root that this
    home itself has had.
    """

    path: str
    volume: str
    mount: str | None
    paths: tuple[str, ...] = ()


def record_file(home: Path) -> Path:
    """Return the path of the record: firstlight/roots.json in $XDG_STATE_HOME, by default ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "firstlight" / "roots.json"


def read(home: Path) -> list[UsedRoot]:
    """Return the roots that the home has used; none if the record is missing or damaged."""
    try:
        content = records.table(records.read_json(record_file(home)))
        return sorted(map(_used_root, records.rows(content["roots"])), key=_order)
    except (OSError, ValueError, KeyError):
        return []


def _used_root(row: dict[str, object]) -> UsedRoot:
    path, volume = (records.typed(row[key], str) for key in ("path", "id"))
    mount = None if row.get("mount") is None else records.typed(row["mount"], str)
    return UsedRoot(path, volume, mount, tuple(records.typed(item, str) for item in records.typed(row["paths"], list)))


def _order(row: UsedRoot) -> tuple[str, str]:
    return row.path, row.volume


def used(home: Path, root: Root, volume: str | None = None) -> UsedRoot | None:
    """Return the entry of a root, or None; with `volume`, only an entry for the volume with this id."""
    rows = [row for row in read(home) if row.path == str(root.path)]
    return next((row for row in rows if volume is None or row.volume == volume), None)


def can_write(home: Path) -> bool:
    """Return whether the record of a home can be written: neither a read-only home nor a full one has a record."""
    folder = record_file(home).parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return False
    space, inodes = capabilities.free_space(folder)
    return space >= _NEEDED_BYTES and (inodes is None or inodes >= _NEEDED_INODES)


def add_root(home: Path, root: Root, volume: str) -> None:
    """Add a root to the record, if the record does not have it; `volume` is the id in the root's marker."""
    if used(home, root, volume) is None:
        mount = _mount_point(root.path)
        is_of_home = mount == _mount_point(home)
        _write(home, [*read(home), UsedRoot(str(root.path), volume, None if is_of_home else str(mount))])


def content_with_paths(home: Path, root: Root, volume: str, links: Iterable[Link]) -> bytes | None:
    """Return the new content of the record, with the current links of the home to a root.

    The result is None if the record does not have the root.

    Args:
        home: the home of the record.
        root: the root.
        volume: the id in the root's marker.
        links: the links of this home that the volume's record has. A link is listed if it exists now, or was listed
            before.
    """
    entry = used(home, root, volume)
    if entry is None:
        return None
    listed = [link.path for link in links if str(link.path) in entry.paths or folder_on(root, link.path) is not None]
    changed = replace(entry, paths=tuple(sorted(map(str, listed))))
    return _content([row for row in read(home) if row != entry] + [changed])


def forget(home: Path, root: Root, path: Path) -> None:
    """Remove the path of a link from the record. A root without paths is removed; a record without roots is deleted."""
    rows = read(home)
    changed = []
    for row in rows:
        if row.path == str(root.path) and str(path) in row.paths:
            rest = tuple(other for other in row.paths if other != str(path))
            changed += [replace(row, paths=rest)] if rest else []
        else:
            changed.append(row)
    if changed == rows:
        return
    with contextlib.suppress(OSError):
        if changed:
            _write(home, changed)
        else:
            record_file(home).unlink()


def forget_unused(home: Path, root: Root) -> None:
    """Remove a root from the record if no path is listed for it; a record without roots is deleted."""
    changed = [row for row in read(home) if row.path != str(root.path) or row.paths]
    if changed:
        _write(home, changed)
    else:
        record_file(home).unlink(missing_ok=True)


def _write(home: Path, rows: list[UsedRoot]) -> None:
    write_atomic(record_file(home), _content(rows))


def _content(rows: list[UsedRoot]) -> bytes:
    roots = [
        {"path": row.path, "id": row.volume, "mount": row.mount, "paths": list(row.paths)}
        for row in sorted(rows, key=_order)
    ]
    return (json.dumps({"schema": SCHEMA, "roots": roots}, indent=1) + "\n").encode("ascii")


def _mount_point(path: Path) -> Path:
    real = path.resolve()
    return next(folder for folder in (real, *real.parents) if os.path.ismount(folder) or folder == folder.parent)
