"""Writes the record of links, and the scripts relink.sh and relink.ps1, which restore the links without Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.fs.atomic import write_atomic
from provision.volume import home_record, links, relink_script
from provision.volume.marker import read_marker
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from provision.core.layout import Root
    from provision.volume.links import Link, LinkFile
    from provision.volume.owner import Owner


def write(root: Root, home: Path, of_home: Iterable[Link], adopt: Owner | None = None) -> None:
    """Replace the recorded links of this home, and write the scripts; the recorded links of other owners stay.

    Args:
        root: the root to which the links lead.
        home: the home folder of this run; with the name of this host it is the owner of the links.
        of_home: all links of this home.
        adopt: an earlier owner whose links are adopted, or None; `of_home` contains its links.
    """
    for path, text in files(root, home, of_home, adopt).items():
        write_atomic(path, text)


def files(root: Root, home: Path, of_home: Iterable[Link], adopt: Owner | None = None) -> dict[Path, bytes]:
    """Return {path: content} of the files that `write` would write: links.json, the scripts, the record in the home."""
    ordered = sorted(of_home)
    in_home = home_record.content_with_paths(home, root, _volume(root), ordered)
    record = {} if in_home is None else {home_record.record_file(home): in_home}
    return _files(root, links.read(root).with_links(current(home), root, ordered, adopt)) | record


def forget(root: Root, home: Path, path: Path) -> None:
    """Remove the link `path` of this home, or of an unknown owner, from the records and the scripts."""
    home_record.forget(home, root, path)
    content = links.read(root)
    rows = [row for row in content.rows if row.owner not in {None, current(home)} or row.link(root, home).path != path]
    if len(rows) < len(content.rows):
        for file, text in _files(root, links.LinkFile(tuple(rows), content.adopted)).items():
            write_atomic(file, text)


def _files(root: Root, content: LinkFile) -> dict[Path, bytes]:
    return {
        root.links: content.to_json(),
        root.relink: relink_script.shell_script(_volume(root), content),
        root.relink.with_suffix(".ps1"): relink_script.powershell_script(_volume(root), content),
    }


def _volume(root: Root) -> str:
    return str((read_marker(root) or {}).get("id"))
