"""Takes an environment away: only one that firstlight made, and only while nothing runs in it."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, SpecError
from provision.environments.prefix import size_bytes
from provision.volume import relink
from provision.volume.environment_marker import read_owner
from provision.volume.journal_acts import EnvironmentRemoval

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root
    from provision.volume.journal import Journal


def removable(prefix: Path, root: Root) -> int:
    """The bytes that a removal would free.

    Raises:
        SpecError: there is no such environment; with those that are there.
        BlockedError: it is not ours, or a program runs in it.
    """
    there = sorted(folder.parent.name for folder in root.prefix("").glob("*/.firstlight.json"))
    if not prefix.exists():
        raise SpecError(f"{prefix} is not there; there is: {', '.join(there) or 'none'}.")
    if read_owner(prefix) is None or prefix.is_symlink():
        raise BlockedError(f"{prefix} was not made by firstlight, so it is left alone. Look at it: ls -la {prefix}")
    running = _running_in(prefix)
    if running:
        raise BlockedError(f"a program runs in {prefix}: {running}. End it, then run again.")
    return size_bytes(prefix)


def remove(prefix: Path, root: Root, home: Path, journal: Journal) -> None:
    """Take conda's link to it away, then its name at once, then its files."""
    aside = prefix.with_name(f".{prefix.name}.building-{uuid.uuid4().hex[:8]}")  # what is cleared if we are killed here
    journal.record(EnvironmentRemoval(prefix))
    link = home / ".conda" / "envs" / prefix.name
    if link.is_symlink() and link.readlink() == prefix:
        link.unlink()
    relink.forget(root, home, link)
    prefix.rename(aside)
    shutil.rmtree(aside)


def _running_in(prefix: Path) -> str | None:
    import psutil

    inside = f"{prefix.resolve()}{os.sep}"
    for process in psutil.process_iter(["pid", "exe", "cmdline"]):
        program = process.info["exe"] or ""
        words = process.info["cmdline"] or []
        if program.startswith(inside) or (words and words[0].startswith((inside, f"{prefix}{os.sep}"))):
            return f"pid {process.info['pid']} ({' '.join(words)[:60]})"
    return None
