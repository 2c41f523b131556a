"""Removes an environment that firstlight has built, unless a program runs in it."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, SpecError
from provision.environments.prefix import size_bytes
from provision.volume import link_files
from provision.volume.environment_marker import read_owner
from provision.volume.journal_acts import EnvironmentRemoval

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root
    from provision.volume.journal import Journal


def removable_bytes(prefix: Path, root: Root) -> int:
    """Check that an environment can be removed, and return its size in bytes.

    Args:
        prefix: the folder of the environment.
        root: the root, whose environments the message lists.

    Raises:
        SpecError: the environment does not exist.
        BlockedError: firstlight did not build the environment, or a program runs in it.
    """
    names = sorted(folder.parent.name for folder in root.prefix("").glob("*/.firstlight.json"))
    if not prefix.exists():
        raise SpecError(f"{prefix} does not exist; the environments of this root: {', '.join(names) or 'none'}.")
    if read_owner(prefix) is None or prefix.is_symlink():
        raise BlockedError(f"{prefix} was not made by firstlight, so it is not removed. Inspect it: ls -la {prefix}")
    program = _running_program(prefix)
    if program:
        raise BlockedError(f"a program runs in {prefix}: {program}. End the program, then run again.")
    return size_bytes(prefix)


def remove(prefix: Path, root: Root, home: Path, journal: Journal) -> None:
    """Remove the link to an environment in conda's folder, then rename the environment's folder, then delete it.

    Args:
        prefix: the folder of the environment.
        root: the root, with the record of links.
        home: the user's home folder, with conda's folder.
        journal: the journal of the run.
    """
    # If this process is killed, the next build deletes the folder, because it has the name of an unfinished build.
    renamed = prefix.with_name(f".{prefix.name}.building-{uuid.uuid4().hex[:8]}")
    journal.record(EnvironmentRemoval(prefix))
    link = home / ".conda" / "envs" / prefix.name
    if link.is_symlink() and link.readlink() == prefix:
        link.unlink()
    link_files.forget(root, home, link)
    prefix.rename(renamed)
    shutil.rmtree(renamed)


def _running_program(prefix: Path) -> str | None:
    """Return the pid and the command of a program that runs in an environment, as text; None without one."""
    import psutil

    beginning = f"{prefix.resolve()}{os.sep}"
    for process in psutil.process_iter(["pid", "exe", "cmdline"]):
        program = process.info["exe"] or ""
        words = process.info["cmdline"] or []
        if program.startswith(beginning) or (words and words[0].startswith((beginning, f"{prefix}{os.sep}"))):
            return f"pid {process.info['pid']} ({' '.join(words)[:60]})"
    return None
