"""Defines the steps of an undo: folders, links, files with their modes, and variables."""

from __future__ import annotations

import difflib
import hashlib
import os
from typing import TYPE_CHECKING

from provision.core.progress import no_progress
from provision.core.step import Check, State
from provision.fs import durable, tree
from provision.fs.atomic import write_atomic
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation.move import FolderMove, MovePair
from provision.volume import journal_acts as acts
from provision.volume import relink, variables

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.volume.journal import Journal


class _UndoStep:
    """Holds the attributes that all steps of an undo share."""

    essential = False
    local = True
    name = ""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal


class UndoMove(_UndoStep):
    """Moves a relocated folder back to its old path, with all files that were added since."""

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
        """Take the paths of the move; `committed` is False if the run was killed before the copy was complete."""
        super().__init__(journal)
        self.name = f"folder {pair.source.name}"
        self.pair = pair
        self.root = root
        self.home = home
        self.committed = committed
        self.progress = progress
        self._back = MovePair(pair.target, pair.source)

    def describe(self) -> str:
        """Return the line of the plan."""
        return f"move {self.pair.target} back to {self.pair.source}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a path has no deeper check)
        """Check at which of the two paths the folder is."""
        source, target = self.pair.source, self.pair.target
        is_at_target = os.path.lexists(target) or self._back.unfinished
        if not self.committed:
            has_partial = os.path.lexists(self.pair.partial)
            return Check(State.DRIFTED if has_partial else State.OK, f"{source} was not moved")
        destination = link_target(source)
        # A killed undo leaves the link that it made for the exchange, which leads to its own path.
        if destination is not None and destination not in {str(target), str(source)}:
            return Check(
                State.BLOCKED, f"{source} is a link to {destination} now, not to {target}. Look at it: ls -l {source}"
            )
        if destination is None and source.is_dir() and not is_at_target:
            has_partial = os.path.lexists(self.pair.partial)
            return Check(State.DRIFTED if has_partial else State.OK, f"{source} is a folder, as before the run")
        if not is_at_target:
            return Check(State.BLOCKED, f"{target} is missing, so it cannot be moved back to {source}")
        return Check(State.DRIFTED, f"the data of {source} is at {target}")

    def apply(self) -> None:
        """Remove the link, move the folder back, and remove what the first move left at the target."""
        source, target = self.pair.source, self.pair.target
        if self.pair.unfinished and link_target(source) == str(target):
            # A killed move has left the original beside the link. Complete the move, so that all its files move back.
            FolderMove(self.journal, self.progress).run([self.pair])
        with OpenDir.at(target.parent) as target_parent:
            if self.committed and (os.path.lexists(target) or self._back.unfinished):
                if link_target(source) == str(target):
                    self.journal.record(acts.LinkReplacement(source, whole=target))
                    with OpenDir.at(source.parent) as source_parent:
                        source_parent.unlink(source.name)
                FolderMove(self.journal, self.progress).run([self._back])
            if link_target(target) == str(source):
                target_parent.unlink(target.name)
            if link_target(self.pair.aside) == str(target):
                self.pair.aside.unlink()  # a killed move has made this link under its temporary name
            tree.remove(target_parent, self.pair.partial.name)
            target_parent.sync()
        relink.forget(self.root, self.home, source)


class UndoLink(_UndoStep):
    """Restores the link that a run replaced, or removes the link that it made."""

    def __init__(self, path: Path, target: str, was: str | None, root: Root, home: Path, journal: Journal) -> None:
        """Take the path of the link, the target that the run set, and the earlier target (None: there was no link)."""
        super().__init__(journal)
        self.name = f"link {path.name}"
        self.path, self.target, self.was = path, target, was
        self.root, self.home = root, home

    def describe(self) -> str:
        """Return the line of the plan."""
        return f"restore the link {self.path} -> {self.was}" if self.was else f"remove the link {self.path}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no deeper check)
        """Compare the target of the link with the run's and the earlier one."""
        target = link_target(self.path)
        if target == self.was and (target is not None or not os.path.lexists(self.path)):
            return Check(State.OK, f"{self.path} is as before the run")
        if target == self.target:
            return Check(State.DRIFTED, f"{self.path} -> {self.target}")
        fact = f"is a link to {target} now, not to {self.target}" if target else "is not a link now"
        return Check(State.BLOCKED, f"{self.path} {fact}. Look at it: ls -l {self.path}")

    def apply(self) -> None:
        """Remove the link, or restore its earlier target."""
        self.journal.record(acts.LinkRemoval(self.path))
        with OpenDir.at(self.path.parent) as parent:
            parent.unlink(self.path.name)
            if self.was:
                parent.symlink(self.path.name, self.was)
            parent.sync()
        relink.forget(self.root, self.home, self.path)


class UndoFile(_UndoStep):
    """Restores the earlier bytes and mode of a file, or removes a file that the run made."""

    def __init__(
        self, path: Path, backup: Path | None, mode: int | None, digests: Collection[str | None], journal: Journal
    ) -> None:
        """Take the file, its backup and mode (None: there was no file), and the sha256 of each version of the run."""
        super().__init__(journal)
        self.name = f"file {path.name}"
        self.path = path
        self.backup, self.mode, self.digests = backup, mode, digests

    def describe(self) -> str:
        """Return the line of the plan."""
        return f"restore the earlier content of {self.path}" if self.backup else f"remove {self.path}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a file is read completely)
        """Compare the file with its backup and with each version that the run wrote."""
        now = self.path.read_bytes() if self.path.exists() else None
        if self.backup is not None and not self.backup.exists():
            return Check(
                State.BLOCKED, f"the backup of {self.path} was deleted by gc, so its earlier content cannot be restored"
            )
        before = self.backup.read_bytes() if self.backup else None
        if now == before:
            return Check(State.OK, f"{self.path} is as before the run")
        if (None if now is None else hashlib.sha256(now).hexdigest()) in self.digests:
            return Check(State.DRIFTED, f"{self.path} has the content that the run wrote")
        old, new = ((text or b"").decode(errors="replace").splitlines() for text in (now, before))
        diff = "\n".join(difflib.unified_diff(old, new, f"{self.path} now", f"{self.path} before", lineterm=""))
        return Check(
            State.BLOCKED, f"{self.path} has changed since the run. Take that change back, or edit it by hand:\n{diff}"
        )

    def apply(self) -> None:
        """Write the earlier bytes with their mode, or remove the file."""
        self.journal.record(acts.FileRestore(self.path))
        if self.backup is None:
            self.path.unlink()
            durable.sync_folder(self.path.parent)
            return
        write_atomic(self.path, self.backup.read_bytes(), like=self.path.stat() if self.path.exists() else None)
        if self.mode is not None:
            self.path.chmod(self.mode)


class UndoFolder(_UndoStep):
    """Removes a folder that the run made, if it is empty."""

    def __init__(self, path: Path, journal: Journal) -> None:
        """Take the path of the folder."""
        super().__init__(journal)
        self.name = f"folder {path.name}"
        self.path = path

    def describe(self) -> str:
        """Return the line of the plan."""
        return f"remove the folder {self.path} if it is empty"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a folder has no deeper check)
        """Check whether the folder exists and is empty."""
        if not self.path.is_dir() or link_target(self.path) is not None:
            return Check(State.OK, f"{self.path} does not exist")
        if any(self.path.iterdir()):
            return Check(State.OK, f"{self.path} stays, because it is not empty")
        return Check(State.DRIFTED, f"{self.path} was made by the run")

    def apply(self) -> None:
        """Remove the folder."""
        self.journal.record(acts.FolderRemoval(self.path))
        self.path.rmdir()
        durable.sync_folder(self.path.parent)


class UndoVariable(_UndoStep):
    """Restores a variable in variables.sh on the volume."""

    def __init__(self, root: Root, name: str, value: str | None, was: str | None, journal: Journal) -> None:
        """Take the name of the variable, the run's value, and the earlier value (None: it was not set)."""
        super().__init__(journal)
        self.name = f"variable {name}"
        self.root, self.variable = root, name
        self.value, self.was = value, was

    def describe(self) -> str:
        """Return the line of the plan."""
        return f"set {self.variable} back to {self.was}" if self.was else f"unset {self.variable}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a variable has no deeper check)
        """Compare the variable's value with the one that the run set and with the one before the run."""
        now = variables.read(self.root).get(self.variable)
        if now == self.was:
            return Check(State.OK, f"{self.variable} is as before the run")
        if now == self.value:
            return Check(State.DRIFTED, f"{self.variable}={now}")
        return Check(
            State.BLOCKED, f"{self.variable}={now} was set after the run. Look at it: cat {self.root.variables}"
        )

    def apply(self) -> None:
        """Write the earlier value."""
        others = {name: value for name, value in variables.read(self.root).items() if name != self.variable}
        self.journal.record(acts.VariableRestore(self.variable))
        variables.write(self.root, others | ({self.variable: self.was} if self.was else {}))
