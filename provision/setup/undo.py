"""Undoes a run by its journal, newest act first: links, folders, files with their modes, and variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError, SpecError
from provision.core.progress import no_progress
from provision.relocation.move import MovePair
from provision.relocation.undo_merge import UndoMergeStep
from provision.setup.undo_steps import UndoFile, UndoFolder, UndoLink, UndoMove, UndoVariable
from provision.volume import journal_acts as acts
from provision.volume.journal import read_journal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.volume.journal import Journal, JournalFile, JournalHeader
    from provision.volume.journal_acts import ReadAct

# The acts that undo leaves as they are, and the text for people.
_KEPT: dict[type[ReadAct], str] = {
    acts.VolumeMark: "the volume keeps its marker",
    acts.EnvironmentBuild: "the environment stays; to remove it: provision env remove NAME",
    acts.EnvironmentRemoval: "a removed environment is not restored; to build it again: provision setup",
}


@dataclass(frozen=True)
class JournaledRun:
    """Describe one run by its journal; `backup` is the folder of its backups."""

    name: str
    header: JournalHeader
    acts: tuple[ReadAct, ...]
    undone: bool
    backup: Path

    @property
    def backup_bytes(self) -> int:
        """Return the size of the backups in bytes."""
        return sum(file.stat().st_size for file in self.backup.rglob("*") if file.is_file())

    def to_dict(self) -> dict[str, object]:
        """Return the run as JSON types."""
        return {
            "run": self.name,
            "command": self.header.command or None,
            "host": self.header.host,
            "acts": len(self.acts),
            "undone": self.undone,
            "backup_bytes": self.backup_bytes,
        }


def runs(root: Root) -> list[JournaledRun]:
    """Return the runs that changed something, oldest first. An undo is not a run of its own."""
    journals = {path.stem: read_journal(path) for path in sorted(root.journal.glob("*.jsonl"))}
    recorded = {name: tuple(entry.act for entry in journal.entries) for name, journal in journals.items()}
    undone = {act.run for run_acts in recorded.values() for act in run_acts if isinstance(act, acts.RunUndone)}
    # The name holds the start in whole seconds and the pid, so names do not order two runs of one second.
    names = sorted(journals, key=lambda name: _started(journals[name]))
    backups = root.state / "backup"
    return [
        JournaledRun(name, journals[name].header, recorded[name], name in undone, backups / name)
        for name in names
        if journals[name].header.command != "undo"
    ]


def _started(journal: JournalFile) -> tuple[str, float]:
    """Return the start of a run as its journal states it, and the time of its first act in seconds since the epoch."""
    return str(journal.header.started), journal.entries[0].at if journal.entries else 0.0


def choose(root: Root, name: str | None) -> JournaledRun:
    """Return the run of this name; without a name, the newest run that is not undone.

    Raises:
        SpecError: there is no such run.
    """
    all_runs = runs(root)
    if name is not None:
        named = [run for run in all_runs if run.name == name]
        if not named:
            raise SpecError(f"there is no run {name}. List the runs: `{layout.program()} undo --list`")
        return named[0]
    # A power loss may leave an empty journal. Its run has changed nothing, since each act is synced before it is done.
    not_undone = [run for run in all_runs if run.acts and not run.undone]
    if not not_undone:
        raise SpecError(f"nothing is left to undo on {root.path}.", next_act=f"{layout.program()} undo --list")
    return not_undone[-1]


def steps(run: JournaledRun, root: Root, home: Path, journal: Journal, progress: Progress = no_progress) -> list[Step]:
    """Return the steps that undo a run, newest act first; one step undoes all acts on the same path.

    Args:
        run: the run to undo.
        root: the root that the run changed.
        home: the home folder.
        journal: the journal of the undo.
        progress: receives the progress of copies.

    Raises:
        BlockedError: an act lacks a field that its undo needs, as in a journal of schema 1.
    """
    built: list[Step] = []
    keys: set[str] = set()

    def once(key: str) -> bool:
        is_new = key not in keys
        keys.add(key)
        return is_new

    moved = {act.source for act in run.acts if isinstance(act, acts.FolderRename | acts.FolderSwap)}
    for act in reversed(run.acts):
        match act:
            case acts.IncompleteAct():
                journal_path = root.journal / f"{run.name}.jsonl"
                raise BlockedError(
                    f"run {run.name} cannot be undone: its journal was written by an older version and does not name "
                    f"the {act.field} of the act `{act.name}`. Take its changes back by hand: cat {journal_path}"
                )
            case acts.MoveAct() if once(f"move {act.source}"):
                built.append(_undo_move(run, MovePair(act.source, act.target), root, home, journal, progress))
            case acts.MoveLink() | acts.EnvironmentLink() if act.path not in moved and once(f"link {act.path}"):
                built.append(UndoLink(act.path, str(act.target), _first_link(run, act.path), root, home, journal))
            case acts.LinkBatch():
                built += [
                    UndoLink(path, str(target), None, root, home, journal)
                    for path, target in zip(act.paths, act.targets, strict=True)
                    if path not in moved and once(f"link {path}")
                ]
            case acts.FileChange() if once(f"file {act.path}"):
                changes = _file_changes(run, act.path)
                # A killed run may have recorded its last change without making it, so all its versions are accepted.
                digests = tuple(dict.fromkeys(change.sha256 for change in changes))
                built.append(UndoFile(act.path, changes[0].backup, changes[0].mode, digests, journal))
            case acts.FolderCreation() | acts.TargetCreation() if once(f"folder {act.path}"):
                built.append(UndoFolder(act.path, journal))
            case acts.VariableChange() if once(f"variable {act.name}"):
                built.append(UndoVariable(root, act.name, act.value, act.was, journal))
    return built


def kept_changes(run: JournaledRun) -> list[str]:
    """Return a line for each change of a run that undo does not take back, with the command that does."""
    kinds = {type(act) for act in run.acts}
    again = ["the next setup makes again what host.toml or a provider profile names"] if kinds - set(_KEPT) else []
    return [text for kind, text in _KEPT.items() if kind in kinds] + again


def _file_changes(run: JournaledRun, path: Path) -> list[acts.FileChange]:
    return [act for act in run.acts if isinstance(act, acts.FileChange) and act.path == path]


def _first_link(run: JournaledRun, path: Path) -> str | None:
    """Return the target of the link that the run's first link at `path` replaced; None if there was no link."""
    links = (act for act in run.acts if isinstance(act, acts.MoveLink | acts.EnvironmentLink) and act.path == path)
    first = next(links)
    return first.was if isinstance(first, acts.MoveLink) else None


def _undo_move(run: JournaledRun, pair: MovePair, root: Root, home: Path, journal: Journal, progress: Progress) -> Step:
    moves = [act for act in run.acts if isinstance(act, acts.MoveAct)]
    of_pair = [act for act in moves if (act.source, act.target) == (pair.source, pair.target)]
    manifests = [act.manifest for act in of_pair if isinstance(act, acts.FolderMerge)]
    if manifests:
        return UndoMergeStep(pair, manifests, root, home, journal)
    commits = (acts.CopyPlacement, acts.FolderRename, acts.FolderSwap)
    committed = any(isinstance(act, commits) for act in of_pair)
    return UndoMove(pair, root, home, journal, progress, committed=committed)


def runs_with_backups(root: Root) -> list[JournaledRun]:
    """Return the runs whose backups still exist."""
    return [run for run in runs(root) if run.backup.exists()]


def delete_backups(with_backups: Sequence[JournaledRun]) -> Iterator[Path]:
    """Delete the backups of these runs; yield each folder after its deletion."""
    import shutil

    for run in with_backups:
        if run.backup.exists():  # another run may have deleted it while this one waited for the lock
            shutil.rmtree(run.backup)
            yield run.backup
