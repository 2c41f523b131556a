"""Finds signs that a root without a marker lies on a volume that is not mounted now."""

from __future__ import annotations

import itertools
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.fs.open_dir import link_target
from provision.volume import home_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from provision.core.layout import Root

_DEPTH = 3  # ~/.cache/huggingface/hub is the deepest link that firstlight makes by default
_MOST_ENTRIES = 20_000  # the scan of a home takes less than a second


@dataclass(frozen=True)
class AbsenceSign:
    """Hold a sign that the volume is not mounted: `fact` is a clause for messages.

    `remedy` is the command that removes the sign, for a volume that will never be mounted again.
    """

    fact: str
    remedy: str


def sign(root: Root, home: Path | None, paths: Iterable[Path]) -> AbsenceSign | None:
    """Return a sign that the volume of a root is not mounted, or None.

    A sign is a dangling link into the root, or a recorded mount point at which nothing is mounted now. A link into the
    root that leads to an existing folder is no sign: the user may have made this link before the first setup.

    Args:
        root: the root, which has no marker.
        home: the home folder, whose record and links are read; with None, only `paths` are read.
        paths: paths that may be links into the root.
    """
    entry = home_record.used(home, root) if home is not None else None
    recorded = map(Path, entry.paths if entry is not None else ())
    scanned = _links_of(home) if home is not None else iter(())
    for path in itertools.chain(paths, recorded, scanned):
        if _leads_nowhere_on(root, path):
            return AbsenceSign(f"no .firstlight marker, but {path} is a link into it", shlex.join(["rm", str(path)]))
    if home is not None and entry is not None and entry.mount is not None and not os.path.ismount(entry.mount):
        remedy = shlex.join(["rm", str(home_record.record_file(home))])
        return AbsenceSign(f"this home has used it, and nothing is mounted at {entry.mount}", remedy)
    return None


def _leads_nowhere_on(root: Root, path: Path) -> bool:
    text = link_target(path)
    if text is None or path.exists():
        return False
    places = [Path(os.path.normpath(path.parent / text))]
    try:
        places.append(path.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False
    return any(place.is_relative_to(top) for place in places for top in (root.path, root.path.resolve()))


def _links_of(home: Path) -> Iterator[Path]:
    """Yield the links in a home, those in the upper folders first, at most to depth 3 and within 20,000 entries."""
    folders, number = [home], 0
    for _ in range(_DEPTH):
        below: list[Path] = []
        for folder in folders:
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError:
                continue
            for entry in entries:
                number += 1
                if entry.is_symlink():
                    yield Path(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    below.append(Path(entry.path))
            if number > _MOST_ENTRIES:
                return
        folders = below
