"""Keeps the files of a SQLite database together in a merge: the database and the logs that stand beside it.

A log belongs to the very database beside which it was written. SQLite plays it back into the database of that name, so
the log of one side would damage the database of the other (sqlite.org/howtocorrupt.html, section 1.4).
"""

from __future__ import annotations

import hashlib
import stat
from typing import TYPE_CHECKING

from provision.fs.merge_names import displaced_name, with_suffix

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from provision.fs.open_dir import OpenDir

_LOGS = ("-journal", "-wal", "-shm")
_Files = dict[str, "os.stat_result"]


def actions(
    original: OpenDir, target: OpenDir, is_same: Callable[[str, os.stat_result, os.stat_result], bool]
) -> dict[str, tuple[str, str | None]]:
    """Return {name: (action, other name)} for the files of databases that differ between two folders.

    All files of one database get the same action. They take their names ("newer", or "added" where the target has no
    such file) if they are newer and the target has no other file of the database. Else they are placed beside the
    target's ("older"), with names that belong together.

    Args:
        original: the folder that is merged.
        target: the folder that receives its entries.
        is_same: called with (name, status in the original, status in the target); returns whether both files are equal.
    """
    ours, theirs = _regular_files(original), _regular_files(target)
    logs = [name for name in {*ours, *theirs} if name.endswith(_LOGS)]
    bases = {name[: -len(log)] for name in logs for log in _LOGS if name.endswith(log)}
    result: dict[str, tuple[str, str | None]] = {}
    for base in sorted(bases):
        mine, present = _unit(base, ours), _unit(base, theirs)
        is_equal = mine.keys() == present.keys() and all(is_same(name, mine[name], present[name]) for name in mine)
        if not mine or not present or is_equal:
            continue
        is_newer = present.keys() <= mine.keys() and _time(mine) > _time(present)
        kept = _other_base(target, base, present) if is_newer else _other_base(original, base, mine)
        for name in mine:
            if is_newer and name not in present:
                result[name] = ("added", None)
            else:
                result[name] = ("newer" if is_newer else "older", kept + name[len(base) :])
    return result


def _regular_files(folder: OpenDir) -> _Files:
    files = ((entry.name, entry.stat(follow_symlinks=False)) for entry in folder.scan())
    return {name: status for name, status in files if stat.S_ISREG(status.st_mode)}


def _unit(base: str, files: _Files) -> _Files:
    return {name: files[name] for name in (base, *(base + log for log in _LOGS)) if name in files}


def _time(unit: _Files) -> int:
    return max(status.st_mtime_ns for status in unit.values())


def _other_base(folder: OpenDir, base: str, unit: _Files) -> str:
    """Return another name for a database; it has a hash of all its files, so a repeated merge returns the same name."""
    names = "".join(displaced_name(folder, name, status) for name, status in unit.items())
    return with_suffix(base, f".firstlight-{hashlib.sha256(names.encode()).hexdigest()[:12]}")
