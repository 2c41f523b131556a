"""Defines the steps of an undo for links, files with their modes, new folders, and variables."""

from __future__ import annotations

import difflib
import hashlib
import os
from typing import TYPE_CHECKING

from provision.core.step import Check, State
from provision.fs import durable
from provision.fs.atomic import write_atomic
from provision.fs.open_dir import OpenDir, link_target
from provision.relocation import outgoing_links, preflight
from provision.relocation.undo_move import kept_for
from provision.volume import home_record, link_files, variables
from provision.volume import journal_acts as acts

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from provision.core.layout import Root
    from provision.volume.journal import Journal
    from provision.volume.link_uses import LinkUse
    from provision.volume.owner import Owner


class _UndoStep:
    """Holds the attributes that all steps of an undo share."""

    essential = False
    local = True
    name = ""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal


class UndoLinkTexts(_UndoStep):
    """Restores the earlier texts of links inside a moved folder. A link that has changed since the run stays."""

    def __init__(self, act: acts.LinkTexts, journal: Journal) -> None:
        """Take the act, which has the links, their texts before the run, and the texts that the run set."""
        super().__init__(journal)
        self.name = f"{len(act.paths)} links"
        self.links = list(zip(act.paths, act.was, act.texts, strict=True))

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        path, was, _ = self.links[0]
        return f"give {len(self.links)} links their relative texts again, such as {path} -> {was}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no deeper check)
        """Check whether a link still has the text that the run set, or a killed run left a temporary link."""
        changed = [path for path, _, text in self.links if link_target(path) == text or _has_prepared(path)]
        if changed:
            return Check(State.DRIFTED, f"{len(changed)} links have the absolute texts of the run")
        return Check(State.OK, f"{len(self.links)} links are as before the run, or were changed since")

    def apply(self) -> None:
        """Set the texts that the links had before the run."""
        for path, was, text in self.links:
            if not (link_target(path) == text or _has_prepared(path)):
                continue
            self.journal.record(acts.LinkTextRestore(path))
            with OpenDir.at(path.parent) as folder:
                outgoing_links.remove_prepared(folder, path.name)
                if folder.readlink(path.name) == text:
                    outgoing_links.set_text(folder, path.name, was)


def _has_prepared(path: Path) -> bool:
    return os.path.lexists(outgoing_links.prepared(path))


class UndoLink(_UndoStep):
    """Restores the link that a run replaced, or removes the link that it made."""

    def __init__(
        self, path: Path, targets: Sequence[str], was: str | None, root: Root, home: Path, journal: Journal
    ) -> None:
        """Take the path of the link, and its targets.

        `targets` are the texts that the run's link can have: the present path of its target, then the path during the
        run. They differ if the volume had another mount point then. `was` is the text of the link before the run; None:
        there was no link.
        """
        super().__init__(journal)
        self.name = f"link {path.name}"
        self.path, self.targets, self.was = path, tuple(dict.fromkeys(targets)), was
        self.root, self.home = root, home

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        return f"restore the link {self.path} -> {self.was}" if self.was else f"remove the link {self.path}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no deeper check)
        """Compare the target of the link with the target that the run set, and with the target before the run.

        Raises:
            BlockedError: the link's folder is not writable.
        """
        target = link_target(self.path)
        if target == self.was and (target is not None or not os.path.lexists(self.path)):
            return Check(State.OK, f"{self.path} is as before the run")
        if target in self.targets:
            preflight.require_writable(self.path.parent)
            return Check(State.DRIFTED, f"{self.path} -> {target}")
        fact = f"is a link to {target} now, not to {self.targets[0]}" if target else "is not a link now"
        return Check(State.BLOCKED, f"{self.path} {fact}. Look at the link: ls -l {self.path}")

    def apply(self) -> None:
        """Remove the link, or restore its earlier target."""
        self.journal.record(acts.LinkRemoval(self.path))
        with OpenDir.at(self.path.parent) as parent:
            parent.unlink(self.path.name)
            if self.was:
                parent.symlink(self.path.name, self.was)
            parent.sync()
        link_files.forget(self.root, self.home, self.path)


class UndoFile(_UndoStep):
    """Restores the earlier bytes and mode of a file, or removes a file that the run made."""

    def __init__(
        self, path: Path, backup: Path | None, mode: int | None, digests: Collection[str | None], journal: Journal
    ) -> None:
        """Take the file, its backup, its earlier mode, and the digests of its versions.

        `backup` and `mode` are None if there was no file. `digests` has the sha256 of each version that the run wrote.
        """
        super().__init__(journal)
        self.name = f"file {path.name}"
        self.path = path
        self.backup, self.mode, self.digests = backup, mode, digests

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        return f"restore the earlier content of {self.path}" if self.backup else f"remove {self.path}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a file is read completely)
        """Compare the file with its backup and with each version that the run wrote.

        Raises:
            BlockedError: the file's folder is not writable.
        """
        now = self.path.read_bytes() if self.path.exists() else None
        if self.backup is not None and not self.backup.exists():
            return Check(
                State.BLOCKED, f"the backup of {self.path} was deleted by gc, so its earlier content cannot be restored"
            )
        before = self.backup.read_bytes() if self.backup else None
        if now == before:
            return Check(State.OK, f"{self.path} is as before the run")
        if (None if now is None else hashlib.sha256(now).hexdigest()) in self.digests:
            preflight.require_writable(self.path.parent)
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

    def __init__(self, path: Path, journal: Journal, others: Sequence[LinkUse] = ()) -> None:
        """Take the path of the folder, and the links of other owners that lead to it."""
        super().__init__(journal)
        self.name = f"folder {path.name}"
        self.path = path
        self.others = others

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        return f"remove the folder {self.path} if it is empty"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a folder has no deeper check)
        """Check whether the folder exists and is empty.

        Raises:
            BlockedError: its parent folder is not writable.
        """
        if not self.path.is_dir() or link_target(self.path) is not None:
            return Check(State.OK, f"{self.path} does not exist")
        if any(self.path.iterdir()):
            return Check(State.OK, f"{self.path} stays, because it is not empty")
        if self.others:
            return Check(State.OK, kept_for(self.path, self.others))
        preflight.require_writable(self.path.parent)
        return Check(State.DRIFTED, f"{self.path} was made by the run")

    def apply(self) -> None:
        """Remove the folder."""
        self.journal.record(acts.FolderRemoval(self.path))
        self.path.rmdir()
        durable.sync_folder(self.path.parent)


class UndoHomeRecord(_UndoStep):
    """Removes the root from the record in the home, if no link of the home leads to the root any more."""

    def __init__(self, root: Root, home: Path, journal: Journal) -> None:
        """Take the root that the run marked, and the home."""
        super().__init__(journal)
        self.name = "record in the home"
        self.root = root
        self.home = home

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        return f"remove {self.root.path} from {home_record.record_file(self.home)} if no link leads to it"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a record has no deeper check)
        """Check whether the record in the home lists the root, but no link that leads to it."""
        entry = home_record.used(self.home, self.root)
        if entry is None:
            return Check(State.OK, f"the record in the home does not list {self.root.path}")
        if entry.paths:
            return Check(State.OK, f"the record stays, because {entry.paths[0]} leads to {self.root.path}")
        return Check(State.DRIFTED, f"the record lists {self.root.path}, to which no link leads")

    def apply(self) -> None:
        """Remove the root from the record in the home."""
        home_record.forget_unused(self.home, self.root)


class UndoVariable(_UndoStep):
    """Restores the earlier value of an environment variable that is stored on the volume."""

    def __init__(
        self, root: Root, name: str, values: Sequence[str | None], was: str | None, journal: Journal, owner: Owner
    ) -> None:
        """Take the name of the variable, the value that the run set, and the value before the run (None: not set).

        `owner` is the host and home whose variables are restored. `values` has the run's value twice: with the present
        path of the volume, and with its path during the run.
        """
        super().__init__(journal)
        self.name = f"variable {name}"
        self.root, self.variable, self.owner = root, name, owner
        self.values, self.was = tuple(dict.fromkeys(values)), was

    def describe(self) -> str:
        """Return one line for the plan: the work that `apply` would do."""
        return f"set {self.variable} back to {self.was}" if self.was else f"unset {self.variable}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a variable has no deeper check)
        """Compare the variable's present value with the value that the run set, and with the value before the run."""
        now = variables.read(self.root, self.owner).get(self.variable)
        if now == self.was:
            return Check(State.OK, f"{self.variable} is as before the run")
        if now in self.values:
            return Check(State.DRIFTED, f"{self.variable}={now}")
        file = variables.shell_file(self.root, self.owner)
        return Check(State.BLOCKED, f"{self.variable}={now} was set after the run. Look at the file: cat {file}")

    def apply(self) -> None:
        """Set the value that the variable had before the run, or remove the variable."""
        present = variables.read(self.root, self.owner)
        others = {name: value for name, value in present.items() if name != self.variable}
        self.journal.record(acts.VariableRestore(self.variable))
        variables.write(self.root, others | ({self.variable: self.was} if self.was else {}), self.owner)
