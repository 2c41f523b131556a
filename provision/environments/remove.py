"""Removes an environment that firstlight made and in which no program runs."""

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


def removable_bytes(prefix: Path, root: Root) -> int:
    """Return the size in bytes of an environment that may be removed.

    Raises:
        SpecError: the environment does not exist; the message lists those of the root.
        BlockedError: firstlight did not make the environment, or a program runs in it.
    """
    names = sorted(folder.parent.name for folder in root.prefix("").glob("*/.firstlight.json"))
    if not prefix.exists():
        raise SpecError(f"{prefix} does not exist; the environments of this root: {', '.join(names) or 'none'}.")
    if read_owner(prefix) is None or prefix.is_symlink():
        raise BlockedError(f"{prefix} was not made by firstlight, so it is not removed. Inspect it: ls -la {prefix}")
    program = _running_program(prefix)
    if program:
        raise BlockedError(f"a program runs in {prefix}: {program}. End it, then run again.")
    return size_bytes(prefix)


def remove(prefix: Path, root: Root, home: Path, journal: Journal) -> None:
    """Remove conda's link to an environment, then rename its folder, then delete the folder."""
    # If this process is killed, the next build deletes the folder, because it has the name of an unfinished build.
    renamed = prefix.with_name(f".{prefix.name}.building-{uuid.uuid4().hex[:8]}")
    journal.record(EnvironmentRemoval(prefix))
    link = home / ".conda" / "envs" / prefix.name
    if link.is_symlink() and link.readlink() == prefix:
        link.unlink()
    relink.forget(root, home, link)
    prefix.rename(renamed)
    shutil.rmtree(renamed)


def _running_program(prefix: Path) -> str | None:
    """Return the process id and the command of a program that runs in an environment, or None."""
    import psutil

    beginning = f"{prefix.resolve()}{os.sep}"
    for process in psutil.process_iter(["pid", "exe", "cmdline"]):
        program = process.info["exe"] or ""
        words = process.info["cmdline"] or []
        if program.startswith(beginning) or (words and words[0].startswith((beginning, f"{prefix}{os.sep}"))):
            return f"pid {process.info['pid']} ({' '.join(words)[:60]})"
    return None
