"""Puts back what a run has changed, newest first: links, folders, files with their modes, variables."""

from __future__ import annotations

import difflib
import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import SpecError
from provision.core.progress import no_progress
from provision.core.step import Check, State
from provision.fs import durable, tree
from provision.fs.atomic import write_atomic
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation.move import FolderMove, MovePair
from provision.relocation.undo_merge import UndoMergeStep
from provision.volume import journal_acts as acts
from provision.volume import relink, variables
from provision.volume.journal import read_journal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.volume.journal import Journal, JournalFile, JournalHeader
    from provision.volume.journal_acts import ReadAct

_STAYS: dict[type[ReadAct], str] = {
    acts.VolumeMark: "the volume keeps its marker",
    acts.EnvironmentBuild: "the environment stays; take it away with: env remove",
    acts.EnvironmentRemoval: "an environment that was removed is made again by setup",
}


@dataclass(frozen=True)
class JournaledRun:
    """One run by its journal."""

    name: str
    header: JournalHeader
    acts: tuple[ReadAct, ...]
    undone: bool
    backup: Path

    @property
    def backup_bytes(self) -> int:
        """What its backup takes."""
        return sum(file.stat().st_size for file in self.backup.rglob("*") if file.is_file())

    def to_dict(self) -> dict[str, object]:
        """As plain JSON types."""
        return {
            "run": self.name,
            "command": self.header.command or None,
            "host": self.header.host,
            "acts": len(self.acts),
            "undone": self.undone,
            "backup_bytes": self.backup_bytes,
        }


def runs(root: Root) -> list[JournaledRun]:
    """The runs that changed something, oldest first; undoing is no run of its own here."""
    journals = {path.stem: read_journal(path) for path in sorted(root.journal.glob("*.jsonl"))}
    recorded = {name: tuple(entry.act for entry in journal.entries) for name, journal in journals.items()}
    undone = {act.run for each in recorded.values() for act in each if isinstance(act, acts.RunUndone)}
    # The names of two runs of one second say nothing of their order.
    names = sorted(journals, key=lambda name: _started(journals[name]))
    backups = root.state / "backup"
    return [
        JournaledRun(name, journals[name].header, recorded[name], name in undone, backups / name)
        for name in names
        if journals[name].header.command != "undo"
    ]


def _started(journal: JournalFile) -> tuple[str, float]:
    """Return when a run began, and the time of its first act."""
    return str(journal.header.started), journal.entries[0].at if journal.entries else 0.0


def choose(root: Root, name: str | None) -> JournaledRun:
    """The named run, else the newest that is not undone.

    Raises:
        SpecError: there is none.
    """
    every = runs(root)
    if name is not None:
        found = [run for run in every if run.name == name]
        if not found:
            raise SpecError(f"there is no run {name}; `{layout.program()} undo --list` shows them.")
        return found[0]
    # A power loss may leave a journal empty: nothing is changed before its first act is on the disk.
    left = [run for run in every if run.acts and not run.undone]
    if not left:
        raise SpecError(f"nothing is left to undo on {root.path}.", next_act=f"{layout.program()} undo --list")
    return left[-1]


def steps(run: JournaledRun, root: Root, home: Path, journal: Journal, progress: Progress = no_progress) -> list[Step]:
    """Return the steps that put a run back, newest first; copies report to `progress`."""
    built: list[Step] = []
    seen: set[str] = set()

    def once(key: str) -> bool:
        fresh = key not in seen
        seen.add(key)
        return fresh

    moved = {act.source for act in run.acts if isinstance(act, acts.FolderRename | acts.FolderSwap)}
    for act in reversed(run.acts):
        match act:
            case acts.IncompleteAct():
                raise KeyError(act.field)
            case acts.MoveAct() if once(f"move {act.source}"):
                built.append(_moved(run, MovePair(act.source, act.target), root, home, journal, progress))
            case acts.MoveLink() | acts.EnvironmentLink() if act.path not in moved and once(f"link {act.path}"):
                built.append(UndoLink(act.path, str(act.target), _first_link(run, act.path), root, home, journal))
            case acts.LinkBatch():
                built += [
                    UndoLink(path, str(target), None, root, home, journal)
                    for path, target in zip(act.paths, act.targets, strict=True)
                    if path not in moved and once(f"link {path}")
                ]
            case acts.FileChange() if once(f"file {act.path}"):
                changes = [each for each in run.acts if isinstance(each, acts.FileChange) and each.path == act.path]
                # A run that was killed has recorded its last change and not made it.
                digests = tuple(dict.fromkeys(change.sha256 for change in changes))
                built.append(UndoFile(act.path, changes[0].backup, changes[0].mode, digests, journal))
            case acts.FolderCreation() | acts.TargetCreation() if once(f"folder {act.path}"):
                built.append(UndoFolder(act.path, journal))
            case acts.VariableChange() if once(f"variable {act.name}"):
                built.append(UndoVariable(root, act.name, act.value, act.was, journal))
    return built


def kept_changes(run: JournaledRun) -> list[str]:
    """What a run did that is not put back, and what to do about it."""
    done = {type(act) for act in run.acts}
    again = ["what host.toml or a profile still asks for, the next setup does again"] if done - set(_STAYS) else []
    return [text for kind, text in _STAYS.items() if kind in done] + again


def _first_link(run: JournaledRun, path: Path) -> str | None:
    """Return the text of the link that the run's first link at `path` replaced; None where there was none."""
    links = (act for act in run.acts if isinstance(act, acts.MoveLink | acts.EnvironmentLink) and act.path == path)
    first = next(links)
    return first.was if isinstance(first, acts.MoveLink) else None


def _moved(run: JournaledRun, pair: MovePair, root: Root, home: Path, journal: Journal, progress: Progress) -> Step:
    moves = [act for act in run.acts if isinstance(act, acts.MoveAct)]
    of_pair = [act for act in moves if (act.source, act.target) == (pair.source, pair.target)]
    manifests = [act.manifest for act in of_pair if isinstance(act, acts.FolderMerge)]
    if manifests:
        return UndoMergeStep(pair, manifests, root, home, journal)
    commits = (acts.CopyPlacement, acts.FolderRename, acts.FolderSwap)
    committed = any(isinstance(act, commits) for act in of_pair)
    return UndoMove(pair, root, home, journal, progress, committed=committed)


class _UndoStep:
    """What every step of an undo is."""

    essential = False
    local = True
    name = ""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal


class UndoMove(_UndoStep):
    """A folder is where it was before it was moved, with all that has come into it since."""

    def __init__(
        self,
        pair: MovePair,
        root: Root,
        home: Path,
        journal: Journal,
        progress: Progress = no_progress,
        *,
        committed: bool,
    ) -> None:
        """Take the pair that was moved; `committed` is False where the run was killed while it copied."""
        super().__init__(journal)
        self.name = f"folder {pair.source.name}"
        self.pair = pair
        self.root = root
        self.home = home
        self.committed = committed
        self.progress = progress
        self._back = MovePair(pair.target, pair.source)

    def describe(self) -> str:
        """The plan's line."""
        return f"move {self.pair.target} back to {self.pair.source}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a place has no depth)
        """Look where the folder is."""
        source, target = self.pair.source, self.pair.target
        there = os.path.lexists(target) or self._back.unfinished
        if not self.committed:
            left = os.path.lexists(self.pair.partial)
            return Check(State.DRIFTED if left else State.OK, f"{source} was not moved")
        found = link_target(source)
        # A killed undo leaves the link that it has prepared, which leads to itself.
        if found is not None and found not in {str(target), str(source)}:
            return Check(
                State.BLOCKED, f"{source} leads to {found} now, and not to {target}. Look at it: ls -l {source}"
            )
        if found is None and source.is_dir() and not there:
            left = os.path.lexists(self.pair.partial)
            return Check(State.DRIFTED if left else State.OK, f"{source} is a folder, as it was")
        if not there:
            return Check(State.BLOCKED, f"{target} is gone, so nothing can be moved back to {source}")
        return Check(State.DRIFTED, f"{source} lies at {target}")

    def apply(self) -> None:
        """Take the link away, move the folder, take away the link that the move left."""
        source, target = self.pair.source, self.pair.target
        if self.pair.unfinished and link_target(source) == str(target):
            # A killed move has left the original beside the link: what it holds goes back with the rest.
            FolderMove(self.journal, self.progress).run([self.pair])
        with OpenDir.at(target.parent) as there:
            if self.committed and (os.path.lexists(target) or self._back.unfinished):
                if link_target(source) == str(target):
                    self.journal.record(acts.LinkReplacement(source, whole=target))
                    with OpenDir.at(source.parent) as parent:
                        parent.unlink(source.name)
                FolderMove(self.journal, self.progress).run([self._back])
            if link_target(target) == str(source):
                there.unlink(target.name)
            if link_target(self.pair.aside) == str(target):
                self.pair.aside.unlink()  # a killed move has prepared it
            tree.remove(there, self.pair.partial.name)
            there.sync()
        relink.forget(self.root, self.home, source)


class UndoLink(_UndoStep):
    """A link is as it was before the run: absent, or leading elsewhere."""

    def __init__(self, path: Path, target: str, was: str | None, root: Root, home: Path, journal: Journal) -> None:
        """Take the link, where the run let it lead, and where it led before (None: it was not there)."""
        super().__init__(journal)
        self.name = f"link {path.name}"
        self.path, self.target, self.was = path, target, was
        self.root, self.home = root, home

    def describe(self) -> str:
        """The plan's line."""
        return f"let {self.path} lead to {self.was} again" if self.was else f"take the link {self.path} away"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no depth)
        """Look where it leads."""
        found = link_target(self.path)
        if found == self.was and (found is not None or not os.path.lexists(self.path)):
            return Check(State.OK, f"{self.path} is as it was")
        if found == self.target:
            return Check(State.DRIFTED, f"{self.path} -> {self.target}")
        now = f"leads to {found}" if found else "is no link"
        return Check(State.BLOCKED, f"{self.path} {now} now, and not to {self.target}. Look at it: ls -l {self.path}")

    def apply(self) -> None:
        """Take it away, or lead it back."""
        self.journal.record(acts.LinkRemoval(self.path))
        with OpenDir.at(self.path.parent) as parent:
            parent.unlink(self.path.name)
            if self.was:
                parent.symlink(self.path.name, self.was)
            parent.sync()
        relink.forget(self.root, self.home, self.path)


class UndoFile(_UndoStep):
    """A file of the user's holds its earlier bytes with its earlier mode, or is absent again."""

    def __init__(
        self, path: Path, backup: Path | None, mode: int | None, digests: Collection[str | None], journal: Journal
    ) -> None:
        """Take the file, its backup and mode (None: it was not there), and the sha256 of all that the run wrote."""
        super().__init__(journal)
        self.name = f"file {path.name}"
        self.path = path
        self.backup, self.mode, self.digests = backup, mode, digests

    def describe(self) -> str:
        """The plan's line."""
        return f"put back the earlier bytes of {self.path}" if self.backup else f"take {self.path} away"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a file is read whole)
        """Compare it with what the run left, and with what was before."""
        now = self.path.read_bytes() if self.path.exists() else None
        if self.backup is not None and not self.backup.exists():
            return Check(State.BLOCKED, f"the backup of {self.path} was dropped by gc, so it cannot be put back")
        before = self.backup.read_bytes() if self.backup else None
        if now == before:
            return Check(State.OK, f"{self.path} is as it was")
        if (None if now is None else hashlib.sha256(now).hexdigest()) in self.digests:
            return Check(State.DRIFTED, f"{self.path} holds what the run wrote")
        old, new = ((text or b"").decode(errors="replace").splitlines() for text in (now, before))
        diff = "\n".join(difflib.unified_diff(old, new, f"{self.path} now", f"{self.path} before", lineterm=""))
        return Check(State.BLOCKED, f"{self.path} was changed since. Take that out, or do it by hand:\n{diff}")

    def apply(self) -> None:
        """Write the earlier bytes, with their mode."""
        self.journal.record(acts.FileRestore(self.path))
        if self.backup is None:
            self.path.unlink()
            durable.sync_folder(self.path.parent)
            return
        write_atomic(self.path, self.backup.read_bytes(), like=self.path.stat() if self.path.exists() else None)
        if self.mode is not None:
            self.path.chmod(self.mode)


class UndoFolder(_UndoStep):
    """A folder that the run made is gone, unless something lies in it."""

    def __init__(self, path: Path, journal: Journal) -> None:
        """Take the folder."""
        super().__init__(journal)
        self.name = f"folder {path.name}"
        self.path = path

    def describe(self) -> str:
        """The plan's line."""
        return f"take the empty folder {self.path} away"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a folder is looked into)
        """Look whether it is there and empty."""
        if not self.path.is_dir() or link_target(self.path) is not None:
            return Check(State.OK, f"{self.path} is not there")
        if any(self.path.iterdir()):
            return Check(State.OK, f"{self.path} stays: something lies in it")
        return Check(State.DRIFTED, f"{self.path} was made by the run")

    def apply(self) -> None:
        """Take it away."""
        self.journal.record(acts.FolderRemoval(self.path))
        self.path.rmdir()
        durable.sync_folder(self.path.parent)


class UndoVariable(_UndoStep):
    """A variable of the volume is as it was."""

    def __init__(self, root: Root, name: str, value: str | None, was: str | None, journal: Journal) -> None:
        """Take its name, the run's value, and the earlier one (None: it was not set)."""
        super().__init__(journal)
        self.name = f"variable {name}"
        self.root, self.variable = root, name
        self.value, self.was = value, was

    def describe(self) -> str:
        """The plan's line."""
        return f"set {self.variable} to {self.was} again" if self.was else f"unset {self.variable}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (there is nothing deeper)
        """Look at its value."""
        now = variables.read(self.root).get(self.variable)
        if now == self.was:
            return Check(State.OK, f"{self.variable} is as it was")
        if now == self.value:
            return Check(State.DRIFTED, f"{self.variable}={now}")
        return Check(State.BLOCKED, f"{self.variable}={now} was set since. Look at it: cat {self.root.variables}")

    def apply(self) -> None:
        """Write the earlier value."""
        every = {name: value for name, value in variables.read(self.root).items() if name != self.variable}
        self.journal.record(acts.VariableRestore(self.variable))
        variables.write(self.root, every | ({self.variable: self.was} if self.was else {}))


def runs_with_backups(root: Root) -> list[JournaledRun]:
    """The runs whose backups take room."""
    return [run for run in runs(root) if run.backup.exists()]


def delete_backups(every: Sequence[JournaledRun]) -> Iterator[Path]:
    """Drop the backups; yields each folder after it is gone."""
    import shutil

    for run in every:
        if run.backup.exists():  # another run may have dropped it while this one waited
            shutil.rmtree(run.backup)
            yield run.backup
