"""Undoes a run by its journal, newest act first: links, folders, files with their modes, and variables."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError, SpecError
from provision.core.progress import no_progress
from provision.relocation.move_pair import MovePair
from provision.relocation.undo_merge import UndoMergeStep
from provision.relocation.undo_move import MoveHistory, UndoMove
from provision.setup import undo_paths
from provision.setup.undo_look_ahead import UndoLookAhead
from provision.setup.undo_steps import UndoFile, UndoFolder, UndoHomeRecord, UndoLink, UndoLinkTexts, UndoVariable
from provision.volume import home_record, link_uses, links, variables
from provision.volume import journal_acts as acts
from provision.volume.journal_paths import PathMap
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.volume.journal import Journal, JournalFile, JournalHeader
    from provision.volume.journal_acts import ReadAct
    from provision.volume.link_uses import LinkUse
    from provision.volume.owner import Owner

# The acts that undo leaves as they are, and the text for people.
_KEPT: dict[type[ReadAct], str] = {
    acts.VolumeMark: "the volume keeps its marker",
    acts.EnvironmentBuild: "the environment stays; to remove it: provision env remove NAME",
    acts.EnvironmentRemoval: "a removed environment is not restored; to build it again: provision setup",
}


@dataclass(frozen=True)
class JournaledRun:
    """Describe one run by its journal: its name, header and acts. `backup` is the folder of its backups."""

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
        """Return the run as a dict of JSON types, as `undo --list --json` prints it."""
        return {
            "run": self.name,
            "command": self.header.command or None,
            "host": self.header.host,
            "home": self.header.home,
            "acts": len(self.acts),
            "undone": self.undone,
            "backup_bytes": self.backup_bytes,
        }


def runs(root: Root) -> list[JournaledRun]:
    """Return the runs on a root that have a journal, oldest first. Undos are not among them."""
    journals = link_uses.read_journals(root)
    recorded = {name: tuple(entry.act for entry in journal.entries) for name, journal in journals.items()}
    undone = {act.run for run_acts in recorded.values() for act in run_acts if isinstance(act, acts.RunUndone)}
    # The name has the start in whole seconds and the pid, so the names of two runs of one second are in no order.
    names = sorted(journals, key=lambda name: _started(journals[name]))
    backups = root.state / "backup"
    return [
        JournaledRun(name, journals[name].header, recorded[name], name in undone, backups / name)
        for name in names
        if journals[name].header.command != "undo"
    ]


def _started(journal: JournalFile) -> tuple[str, float]:
    """Return (start of a run as text, time of its first act in seconds since the epoch), from its journal."""
    return str(journal.header.started), journal.entries[0].at if journal.entries else 0.0


def choose(root: Root, name: str | None, owner: Owner) -> JournaledRun:
    """Return the run with the name `name`; if `name` is None, the owner's newest run that is not undone.

    Raises:
        SpecError: there is no such run.
    """
    all_runs = runs(root)
    if name is not None:
        named = [run for run in all_runs if run.name == name]
        if not named:
            raise SpecError(f"there is no run {name}. List the runs: `{layout.program()} undo --list`")
        return named[0]
    # A power loss may leave an empty journal. Its run has changed nothing, since each act is synced before its change.
    not_undone = [run for run in all_runs if run.acts and not run.undone]
    owners = links.own_owners(root, owner)
    own = [run for run in not_undone if run.header.owner in owners]
    if not own:
        listing = f"{layout.program()} undo --list"
        others = f" {len(not_undone)} runs of other hosts or homes are not undone: `{listing}`" if not_undone else ""
        raise SpecError(f"nothing is left to undo: {owner} has no such run on {root.path}.{others}", next_act=listing)
    return own[-1]


@dataclass(frozen=True)
class _Undo:
    """Hold the values that the steps of one undo share.

    The acts of `run` have present paths; `paths` maps these to the paths at the time of the run. `uses` are the links
    of all owners into the root. `undo_acts` are the acts of this owner's undos since the run. `own` has this
    home's owner, those that it has adopted, and the owner of the run.
    """

    run: JournaledRun
    root: Root
    home: Path
    journal: Journal
    progress: Progress
    paths: PathMap
    uses: Sequence[LinkUse]
    undo_acts: Sequence[ReadAct]
    own: frozenset[Owner]

    def others(self, folder: Path) -> list[LinkUse]:
        """Return the links of other owners that lead to a folder on the volume; those in `own` are none of them."""
        if not folder.is_relative_to(self.root.path):
            return []
        return link_uses.of_others(self.uses, folder, self.own, _link_paths(self.run.acts))

    @property
    def variables_owner(self) -> Owner:
        """Return the owner whose variables the run has set; this home has taken over those of an adopted owner."""
        mine, owner = current(self.home), self.run.header.owner
        return mine if owner is None or owner in links.own_owners(self.root, mine) else owner


def steps(run: JournaledRun, root: Root, home: Path, journal: Journal, progress: Progress = no_progress) -> list[Step]:
    """Return the steps that undo a run, newest act first; one step undoes all acts on the same path.

    The first step checks the conditions of the other steps together, and changes nothing.

    Args:
        run: the run to undo.
        root: the root that the run changed, at its present path.
        home: the home folder; paths in the home of the run are mapped to this home.
        journal: the journal of the undo.
        progress: receives the progress of copies.

    Raises:
        BlockedError: an act does not have a field that its undo needs, as in a journal of schema 1; or it names a path
            that no run changes.
    """
    undo = _prepared(run, root, home, journal, progress)
    undo_paths.require_own(run.name, undo.run.acts, root, home, os.environ)
    filled = _filled_folders(undo)
    built: list[Step] = [_undo_move(undo, pair, is_filled=True) for pair in filled]
    keys: set[str] = set()

    def once(key: str) -> bool:
        is_new = key not in keys
        keys.add(key)
        return is_new

    moved = {act.source for act in undo.run.acts if isinstance(act, acts.FolderRename | acts.FolderSwap)}
    for act in reversed(_without(undo.run.acts, filled)):
        match act:
            case acts.IncompleteAct():
                journal_path = root.journal / f"{run.name}.jsonl"
                raise BlockedError(
                    f"run {run.name} cannot be undone: its journal was written by an older version and does not name "
                    f"the {act.field} of the act `{act.name}`. Take the changes back by hand: cat {journal_path}"
                )
            case acts.MoveAct() if once(f"move {act.source}"):
                built.append(_undo_move(undo, MovePair(act.source, act.target)))
            case acts.MoveLink() | acts.EnvironmentLink() if act.path not in moved and once(f"link {act.path}"):
                built.append(_undo_link(undo, act.path, act.target, _first_link(undo.run, act.path)))
            case acts.LinkBatch():
                built += [
                    _undo_link(undo, path, target, None)
                    for path, target in zip(act.paths, act.targets, strict=True)
                    if path not in moved and once(f"link {path}")
                ]
            case acts.FileChange() if once(f"file {act.path}"):
                changes = _file_changes(undo.run, act.path)
                # A killed run may have recorded its last change without making it, so all its versions are accepted.
                digests = tuple(dict.fromkeys(change.sha256 for change in changes))
                built.append(UndoFile(act.path, changes[0].backup, changes[0].mode, digests, journal))
            case acts.FolderCreation() | acts.TargetCreation() if once(f"folder {act.path}"):
                built += _undo_folder(undo, act.path)
            case acts.VariableChange() if act.name in variables.NAMES and once(f"variable {act.name}"):
                values = [act.value, undo.paths.earlier_text(act.value)]
                built.append(UndoVariable(root, act.name, values, act.was, journal, undo.variables_owner))
    moves = [step for step in built if isinstance(step, UndoMove | UndoMergeStep)]
    # The relative text of a link is right only at the folder's old path, so it is restored after all moves.
    built += [UndoLinkTexts(act, journal) for act in reversed(undo.run.acts) if isinstance(act, acts.LinkTexts)]
    return [UndoLookAhead(moves, root, home), *built] if built else []


def kept_changes(run: JournaledRun) -> list[str]:
    """Return a line for each kind of change of a run that undo leaves in place, with the command that reverses it."""
    kinds = {type(act) for act in run.acts}
    again = ["the next setup repeats the changes that host.toml or a profile names"] if kinds - set(_KEPT) else []
    return [text for kind, text in _KEPT.items() if kind in kinds] + again


def _prepared(run: JournaledRun, root: Root, home: Path, journal: Journal, progress: Progress) -> _Undo:
    journals = link_uses.read_journals(root)
    before = link_uses.earlier_roots(journals.values(), root)
    file = journals[run.name]
    paths = link_uses.path_map(file, root, before)
    if run.header.home and Path(run.header.home) != home:
        paths = PathMap((*paths.pairs, (Path(run.header.home), home)))
    last = max((entry.at for entry in file.entries), default=0.0)
    own = links.own_owners(root, current(home)) | ({run.header.owner} if run.header.owner else set())
    undo_acts = [
        link_uses.path_map(other, root, before).act(entry.act)
        for other in journals.values()
        if other.header.command == "undo" and other.header.owner in {*own, run.header.owner}
        for entry in other.entries
        if entry.at >= last
    ]
    present = replace(run, acts=tuple(map(paths.act, run.acts)))
    uses = link_uses.link_uses(root, home, {name: other for name, other in journals.items() if name != run.name})
    return _Undo(present, root, home, journal, progress, paths, uses, undo_acts, own)


def _file_changes(run: JournaledRun, path: Path) -> list[acts.FileChange]:
    return [act for act in run.acts if isinstance(act, acts.FileChange) and act.path == path]


def _first_link(run: JournaledRun, path: Path) -> str | None:
    """Return the target of the link that was at `path` before the run; None if there was no link."""
    links = (act for act in run.acts if isinstance(act, acts.MoveLink | acts.EnvironmentLink) and act.path == path)
    first = next(links)
    return first.was if isinstance(first, acts.MoveLink) else None


def _link_paths(run_acts: Sequence[ReadAct]) -> set[Path]:
    """Return the paths at which a run made links."""
    paths = {path for act in run_acts if isinstance(act, acts.LinkBatch) for path in act.paths}
    paths |= {act.path for act in run_acts if isinstance(act, acts.MoveLink | acts.EnvironmentLink)}
    return paths | {act.source for act in run_acts if isinstance(act, acts.MoveAct)}


def _undo_folder(undo: _Undo, path: Path) -> list[Step]:
    folder = UndoFolder(path, undo.journal, undo.others(path))
    if path == home_record.record_file(undo.home).parent:
        return [UndoHomeRecord(undo.root, undo.home, undo.journal), folder]
    return [folder]


def _undo_link(undo: _Undo, path: Path, target: Path, was: str | None) -> UndoLink:
    targets = [str(target), str(undo.paths.earlier(target))]
    return UndoLink(path, targets, was, undo.root, undo.home, undo.journal)


def _filled_folders(undo: _Undo) -> list[MovePair]:
    """Return the folders that the run made empty on the volume, with a link, and that have got content since.

    The folder of a tool's cache is none of them: what the tool has stored there stays on the volume.
    """
    of_tools = (undo.root.cache, undo.root.pkgs, undo.root.path / "envs")
    filled = []
    for act in undo.run.acts:
        if isinstance(act, acts.TargetCreation) and not any(map(act.target.is_relative_to, of_tools)):
            has_content = act.target.is_dir() and any(act.target.iterdir())
            is_moved = any(isinstance(done, acts.MoveAct) and done.source == act.target for done in undo.undo_acts)
            if has_content or is_moved or MovePair(act.target, act.source).unfinished:
                filled.append(MovePair(act.source, act.target))
    return filled


def _without(run_acts: Sequence[ReadAct], filled: Sequence[MovePair]) -> list[ReadAct]:
    """Return the acts of a run without those that made these folders and their links."""
    sources = {pair.source for pair in filled}
    return [
        act for act in run_acts if not (isinstance(act, acts.TargetCreation | acts.MoveLink) and act.source in sources)
    ]


def _undo_move(undo: _Undo, pair: MovePair, *, is_filled: bool = False) -> UndoMove | UndoMergeStep:
    """Return the step that moves a folder back; `is_filled`: the run made it empty, and it has got content since."""
    moves = [act for act in undo.run.acts if isinstance(act, acts.MoveAct)]
    of_pair = [act for act in moves if (act.source, act.target) == (pair.source, pair.target)]
    manifests = [act.manifest for act in of_pair if isinstance(act, acts.FolderMerge)]
    earlier, others = undo.paths.earlier(pair.target), undo.others(pair.target)
    if manifests:
        return UndoMergeStep(pair, manifests, undo.root, undo.home, undo.journal, earlier_target=earlier, others=others)
    commits = (acts.CopyPlacement, acts.FolderRename, acts.FolderSwap)
    back = [act for act in undo.undo_acts if isinstance(act, commits)]
    splits = [act for act in undo.undo_acts if isinstance(act, acts.MergeSplit)]
    was_removed = any(isinstance(act, acts.OriginalRemoval) and act.aside != act.source for act in of_pair)
    history = MoveHistory(
        committed=is_filled or any(isinstance(act, commits) for act in of_pair),
        original_may_remain=any(isinstance(act, acts.CopyPlacement) for act in of_pair) and not was_removed,
        undo_placed=any((act.source, act.target) == (pair.target, pair.source) for act in back),
        undo_split=any((act.source, act.target) == (pair.source, pair.target) for act in splits),
        earlier_target=earlier,
    )
    return UndoMove(pair, undo.root, undo.home, undo.journal, undo.progress, history=history, others=others)


def runs_with_backups(root: Root, owner: Owner) -> list[JournaledRun]:
    """Return the runs of an owner, and of an unknown one, whose backups still exist."""
    owners = {*links.own_owners(root, owner), None}
    return [run for run in runs(root) if run.backup.exists() and run.header.owner in owners]


def delete_backups(with_backups: Sequence[JournaledRun]) -> Iterator[Path]:
    """Delete the backups of these runs, and yield the path of each deleted folder."""
    import shutil

    for run in with_backups:
        if run.backup.exists():  # another run may have deleted this folder while this run waited for the lock
            shutil.rmtree(run.backup)
            yield run.backup
