"""Checks that the paths in the journal of a run are paths that firstlight changes, before undo changes them.

A journal lies on the volume. If another program has written it, it could name any file of this host.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.volume import journal_acts as acts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from provision.core.layout import Root
    from provision.volume.journal_acts import ReadAct

# The variables that name a settings file of a tool, or a folder of settings files, outside of the home.
_FILES = ("PIP_CONFIG_FILE", "CONDARC", "UV_CONFIG_FILE")
_FOLDERS = ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "ZDOTDIR")
# The files in the home that firstlight changes; each may be a link to a folder of dotfiles anywhere.
_IN_HOME = (
    ".bashrc",
    ".bash_profile",
    ".zshrc",
    ".config/fish/config.fish",
    ".condarc",
    ".config/pip/pip.conf",
    ".pip/pip.conf",
    ".config/uv/uv.toml",
)


def require_own(run: str, run_acts: Sequence[ReadAct], root: Root, home: Path, environ: Mapping[str, str]) -> None:
    """Check the paths of a run.

    The data of a move, the target of a link and each backup lie in the root. A changed file lies in the root, in the
    home, or where a variable of a tool names its settings.

    Args:
        run: the name of the run, for the message.
        run_acts: the acts with present paths.
        root: the root.
        home: the home.
        environ: the environment variables.

    Raises:
        BlockedError: a path lies elsewhere; the message has the path and the file of the journal.
    """
    named = [environ[name] for name in _FILES if environ.get(name)]
    real = [os.path.realpath(path) for path in [*named, *(str(home / name) for name in _IN_HOME)]]
    files = {*named, *real}
    folders = [root.path, home, *(Path(environ[name]) for name in _FOLDERS if environ.get(name))]
    for act in run_acts:
        foreign = next((path for path in _in_root(act) if not _is_inside(path, [root.path])), None)
        if foreign is None and isinstance(act, acts.FileChange) and str(act.path) not in files:
            foreign = None if _is_inside(act.path, folders) else act.path
        if foreign is not None:
            raise BlockedError(
                f"the journal of run {run} names {foreign}, which no run of firstlight changes, so nothing was undone. "
                f"Look at the journal: cat {root.journal / f'{run}.jsonl'}. If {foreign} is a settings file of a tool, "
                f"set the tool's variable ({', '.join(_FILES)}) to it as at the time of the run, then run again."
            )


def _in_root(act: ReadAct) -> Iterator[Path]:
    """Yield the paths of an act that must lie in the root."""
    match act:
        case acts.MoveAct() | acts.MoveLink() | acts.EnvironmentLink() | acts.TargetCreation():
            yield act.target
        case acts.LinkBatch():
            yield from act.targets
        case acts.FileChange() if act.backup is not None:
            yield act.backup


def _is_inside(path: Path, folders: Sequence[Path]) -> bool:
    """Return whether a path lies in one of the folders, by its text and also behind links."""
    text = Path(os.path.normpath(path))
    real = Path(os.path.realpath(path.parent)) / path.name
    return any(
        (text.is_relative_to(folder) or real.is_relative_to(folder.resolve())) and ".." not in path.parts
        for folder in folders
    )
