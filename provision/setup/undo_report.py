"""Lists the folders that the undo of another owner's run moves off the volume, and the links that dangle afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.core.step import State
from provision.fs import tree
from provision.fs.open_dir import OpenDir
from provision.relocation.undo_merge import UndoMergeStep
from provision.relocation.undo_move import UndoMove
from provision.volume import link_uses, links
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.core.step import Step
    from provision.setup.undo import JournaledRun


def losses(run: JournaledRun, steps: Sequence[Step], root: Root, home: Path) -> list[str]:
    """Return lines for the user: the owner of the run, each folder that leaves the volume, and each link to it.

    Args:
        run: a run of another owner.
        steps: the steps that would undo the run.
        root: the root on which the run was made.
        home: the home folder to which the folders would move.
    """
    own = current(home)
    adopted = links.own_owners(root, own)
    owner = run.header.owner or f"{run.header.host or 'an unknown host'}, with an unknown home"
    lines = [f"run {run.name} ({run.header.command or '?'}) was made by {owner}; this is {own}."]
    if run.header.home and run.header.home != str(home):
        lines.append(f"its paths below {run.header.home} are taken as paths below {home}.")
    uses = link_uses.link_uses(root, home, link_uses.read_journals(root))
    moves = [step for step in steps if isinstance(step, UndoMove | UndoMergeStep) and not step.others]
    departures = [step for step in moves if step.check().state is State.DRIFTED]
    for step in departures:
        lines.append(f"leaves the volume: {step.pair.target}, {_size(step)}; it goes to {step.pair.source}")
        dangling = (use for use in uses if use.owner not in adopted and use.target.is_relative_to(step.pair.target))
        lines += [f"  then leads nowhere: {use} -> {use.target}" for use in sorted(dangling, key=str)]
    return lines if departures else [*lines, "nothing leaves the volume."]


def _size(step: UndoMove | UndoMergeStep) -> str:
    if isinstance(step, UndoMergeStep):
        size = step.size_to_copy()
        return f"the files that came from {step.pair.source}, {size.bytes:,} bytes"
    with OpenDir.at(step.pair.target) as folder:
        size = tree.measure(folder)
    return f"{size.files:,} files, {size.data:,} bytes"
