"""Defines the setup step that writes the chosen mirrors into settings files, and the steps that restore the files."""

from __future__ import annotations

import difflib
import hashlib
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.errors import SpecError
from provision.core.step import Check, State
from provision.fs import durable
from provision.fs.atomic import write_atomic
from provision.mirrors import chosen_mirrors
from provision.mirrors.chosen_mirrors import MirrorRecord, WrittenFile
from provision.mirrors.tools import all_tools
from provision.mirrors.tools.tool import ConfigFile, ConfigScope, Stage
from provision.volume import variables
from provision.volume.changes import keep_backup, make_folders
from provision.volume.environment_marker import python_source, read_owner, site_folders

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from provision.core.layout import Root
    from provision.core.step import Step
    from provision.volume.journal import Journal

_EDITED = "edited since"  # written instead of a sha256 that no content matches


def mirror_variables(record: MirrorRecord) -> dict[str, str]:
    """Return {environment variable: value} for the chosen mirrors of all tools, in the order of the tools."""
    values: dict[str, str] = {}
    for tool in all_tools.TOOLS:
        source = record.chosen(tool.name)
        if not source.is_official:
            values |= tool.variables(source)
    return values


def targets(
    record: MirrorRecord, prefix: Path, home: Path, environ: Mapping[str, str], *, conda_is_here: bool
) -> list[ConfigFile]:
    """Return all settings files for mirrors: those of the environment first, then the user's.

    They are the files of each tool, and the files that set variables in an environment: a .pth file, whose line Python
    runs when it starts, and the activation scripts of a conda environment.

    Args:
        record: the record of the chosen mirrors.
        prefix: the folder of the environment.
        home: the user's home folder.
        environ: the environment variables.
        conda_is_here: conda is installed on this host.
    """
    owner = read_owner(prefix)
    source = None if owner is None else python_source(owner)
    scope = ConfigScope(record, prefix, source, home, environ, conda_is_here)
    files = [file for tool in all_tools.TOOLS for file in tool.config_files(scope)]
    return sorted([*files, *_variable_files(scope)], key=lambda file: file.stage)


def _variable_files(scope: ConfigScope) -> Iterator[ConfigFile]:
    if scope.python_source is None:
        return
    values, groups = mirror_variables(scope.record), all_tools.variable_groups()
    line = variables.start_line(values, [group for group in groups if group.at_start]).encode("ascii")
    for site in site_folders(scope.prefix):
        yield ConfigFile(site / "firstlight-mirrors.pth", lambda _: line, Stage.PYTHON_START)
    if scope.python_source.is_conda:
        for folder, suffix, text in variables.hooks(values, [group for group in groups if group.at_activation]):
            path = scope.prefix / "etc" / "conda" / folder / f"firstlight-mirrors{suffix}"
            yield ConfigFile(path, lambda _, text=text: text.encode(), Stage.ACTIVATION)  # type: ignore[misc]


def _variable_names() -> list[str]:
    """Return the names of all environment variables that firstlight sets for mirrors."""
    return [name for group in all_tools.variable_groups() for name in group.names]


class SettingsStep:
    """Makes sure that every settings file and variable has the chosen mirror; the user's own settings are kept."""

    name = "mirror settings"
    essential = False
    local = True

    def __init__(
        self, root: Root, prefix: Path, home: Path, environ: Mapping[str, str], journal: Journal, *, conda_is_here: bool
    ) -> None:
        """Store the arguments.

        Args:
            root: the root, with the record of the chosen mirrors.
            prefix: the folder of the environment.
            home: the user's home folder.
            environ: the environment variables.
            journal: the journal of the run.
            conda_is_here: conda is installed, so that the user's .condarc is written even if it does not exist.
        """
        self.root, self.prefix, self.home, self.environ = root, prefix, home, environ
        self.journal = journal
        self.conda_is_here = conda_is_here

    def describe(self) -> str:
        """Return the text of this step in the plan."""
        return "write the chosen mirrors into pip's, conda's and uv's settings"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (files are read whole)
        """Check that each settings file and environment variable has the chosen mirrors."""
        record = chosen_mirrors.read(self.root) or MirrorRecord()
        drifted = [str(target.path) for target in self._targets(record) if _differs(target, record)]
        drifted += [name for name, value in self._variables(record).items() if _value(self.root, name) != value]
        notes = [f"{tool}: {choice.why}" for tool, choice in record.choices.items() if not choice.sources]
        for name, value in ({} if record.restored else mirror_variables(record)).items():
            if self.environ.get(name) not in {None, "", value}:
                notes.append(f"{name} is set in this shell and has priority over the mirror: unset {name}")
        if drifted:
            return Check(State.DRIFTED, f"{drifted[0]} does not have the chosen mirror{_more(len(drifted) - 1)}")
        overridden = any(not choice.first.is_official for choice in record.choices.values())
        detail = (
            f"{len(record.written)} files have the chosen mirrors" if overridden else "no settings file has a mirror"
        )
        return Check(State.OK, detail, "; ".join(notes) or None)

    def apply(self) -> None:
        """Write the files and variables that differ; the earlier bytes are kept for `mirrors restore` and `undo`."""
        record = chosen_mirrors.read(self.root) or MirrorRecord()
        for target in self._targets(record):
            if _differs(target, record):
                record = self._write(target, record)
        for name, value in self._variables(record).items():
            if _value(self.root, name) != value:
                variables.set_value(self.root, name, value, self.journal)

    def _targets(self, record: MirrorRecord) -> list[ConfigFile]:
        if record.restored or not record.choices:
            return []
        files = targets(record, self.prefix, self.home, self.environ, conda_is_here=self.conda_is_here)
        return [replace(file, path=file.path.resolve()) for file in files]

    def _variables(self, record: MirrorRecord) -> dict[str, str | None]:
        """Return {environment variable: the value that it should have; None if it should be unset}."""
        expected = {} if record.restored else mirror_variables(record)
        present = variables.read(self.root)
        return {name: expected.get(name) for name in _variable_names() if name in expected or name in present}

    def _write(self, target: ConfigFile, record: MirrorRecord) -> MirrorRecord:
        """Write one settings file, and return the record with an entry for it.

        The record is written to the root before the settings file, so that a kill leaves no file without an entry.
        """
        path = target.path
        present = _read(path)
        base, written = _base(path, record)
        content = target.render(base or b"")
        after = content if content or base is not None else None
        folders = written.folders if written else _folders(path, record)
        is_original = written is None or base == _original(written)
        if written is None:
            written = WrittenFile(str(path), self._keep_original(base, record), _mode(path), "", folders)
        # A file that was edited after firstlight has written it has the user's content too. `restore` must not replace
        # such a file without --force, so the recorded hash must match no content.
        written = replace(written, sha256=_digest(after) if is_original else _EDITED)
        others = tuple(file for file in record.written if file.path != str(path))
        is_restored = is_original and after == base
        updated = replace(record, written=others if is_restored else (*others, written))
        keep_backup(chosen_mirrors.record_path(self.root), chosen_mirrors.to_json(updated).encode(), self.journal)
        chosen_mirrors.write(self.root, updated)
        make_folders(path.parent, self.journal)
        keep_backup(path, after, self.journal)
        if after is None:
            _remove(path, written.folders)
        elif after != present:
            write_atomic(path, after, like=path.stat() if present is not None else None)
        return updated

    def _keep_original(self, content: bytes | None, record: MirrorRecord) -> str | None:
        if content is None:
            return None
        backup = self.root.state / "mirrors" / f"original-{len(record.written) + 1}-{_digest(content)[:12]}"
        write_atomic(backup, content, private=True)
        return str(backup)


class RestoreFileStep:
    """Makes sure that a settings file has its original bytes and mode, or does not exist if it did not exist before."""

    essential = False
    local = True

    def __init__(self, written: WrittenFile, journal: Journal, *, force: bool) -> None:
        """Store the arguments.

        Args:
            written: the record's entry of the changed file.
            journal: the journal of the run.
            force: restore the file even if the user has edited it; a copy of the edited file is kept.
        """
        self.name = f"restore {Path(written.path).name}"
        self.written = written
        self.path = Path(written.path)
        self.journal = journal
        self.force = force

    def describe(self) -> str:
        """Return the text of this step in the plan."""
        return f"restore {self.path}" if self.written.kept else f"remove {self.path}"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a file is read whole)
        """Compare the file with its original content and with the content that firstlight has written.

        The state is blocked if the user has edited the file since, unless `force` is set.
        """
        present, original = _read(self.path), _original(self.written)
        mode_is_right = present is None or self.written.mode is None or _mode(self.path) == self.written.mode
        # An interrupted run may have made the folders for a file, but not the file.
        has_empty_folders = present is None and any(map(_is_empty, map(Path, self.written.folders)))
        if present == original and mode_is_right and not has_empty_folders:
            return Check(State.OK, f"{self.path} has its original content")
        if present is None or present == original or _digest(present) == self.written.sha256 or self.force:
            return Check(State.DRIFTED, f"{self.path} does not have its original content and mode")
        old, new = ((text or b"").decode(errors="replace").splitlines() for text in (present, original))
        diff = "\n".join(difflib.unified_diff(old, new, f"{self.path} now", f"{self.path} before", lineterm=""))
        return Check(
            State.BLOCKED,
            f"{self.path} was edited after firstlight wrote it. Add --force to restore the original; the edited file "
            f"is kept in the same folder as {self.path.name}.firstlight-kept-N:\n{diff}",
        )

    def apply(self) -> None:
        """Restore the file's original content and mode.

        Remove the file if it did not exist before firstlight wrote it. If the user has edited the file since, first
        write a copy of the edited file to NAME.firstlight-kept-N in the same folder.
        """
        present, original = _read(self.path), _original(self.written)
        if present is not None and present != original and _digest(present) != self.written.sha256:
            copies = (self.path.with_name(f"{self.path.name}.firstlight-kept-{n}") for n in range(1, 1000))
            copy = next(path for path in copies if not path.exists())
            write_atomic(copy, present, like=self.path.stat())
        make_folders(self.path.parent, self.journal)
        keep_backup(self.path, original, self.journal)
        if original is None:
            _remove(self.path, self.written.folders)
            return
        write_atomic(self.path, original, like=self.path.stat() if present is not None else None)
        if self.written.mode is not None:
            self.path.chmod(self.written.mode)


class RestoreChoiceStep:
    """Makes sure that no mirror is recorded or set in a variable, and that setup chooses no mirror on its own."""

    name = "mirrors"
    essential = False
    local = True

    def __init__(self, root: Root, journal: Journal) -> None:
        """Store the root and the journal of the run."""
        self.root = root
        self.journal = journal

    def describe(self) -> str:
        """Return the text of this step in the plan."""
        return "remove the chosen mirrors from the record and the variables"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (there is nothing deeper)
        """Check that the record has no choice, and that no variable is set to a mirror."""
        record = chosen_mirrors.read(self.root)
        if record is not None and not record.restored:
            return Check(State.DRIFTED, "mirrors are chosen")
        if set(_variable_names()) & set(variables.read(self.root)):
            return Check(State.DRIFTED, "variables name a mirror")
        return Check(State.OK, "no mirror is chosen, and no variable names one")

    def apply(self) -> None:
        """Unset the variables, and write a record without choices in which `restored` is true."""
        for name in _variable_names():
            if name in variables.read(self.root):
                variables.set_value(self.root, name, None, self.journal)
        record = MirrorRecord(restored=True)
        keep_backup(chosen_mirrors.record_path(self.root), chosen_mirrors.to_json(record).encode(), self.journal)
        chosen_mirrors.write(self.root, record)


def restore_steps(root: Root, journal: Journal, *, force: bool) -> list[Step]:
    """Return the steps of `mirrors restore`: one for each changed settings file, then the one that removes the choices.

    Args:
        root: the root, with the record.
        journal: the journal of the run.
        force: restore even the files that the user has edited.
    """
    record = chosen_mirrors.read(root) or MirrorRecord()
    return [*(RestoreFileStep(file, journal, force=force) for file in record.written), RestoreChoiceStep(root, journal)]


def _differs(target: ConfigFile, record: MirrorRecord) -> bool:
    base, written = _base(target.path, record)
    try:
        content = target.render(base or b"")
    except SpecError as error:
        raise SpecError(f"{target.path}: {error}") from None
    present = _read(target.path)
    if present is None and content == (base or b""):
        return False  # the file does not exist, and there is no setting to write into it
    if not content and written is not None and _original(written) is None:
        return present is not None
    return content != (present or b"")


def _base(path: Path, record: MirrorRecord) -> tuple[bytes | None, WrittenFile | None]:
    """Return (the content to which the settings are added, the file's entry in the record).

    The content is the original content, so that a file that was lost in a wipe has the user's settings again. If the
    file was edited after firstlight wrote it, it is the present content. None stands for a file that does not exist,
    or for no entry in the record.
    """
    present = _read(path)
    written = next((file for file in record.written if file.path == str(path)), None)
    if written is None:
        return present, None
    original = _original(written)
    if present is None or present == original or _digest(present) == written.sha256:
        return original, written
    return present, written


def _remove(path: Path, folders: Sequence[str]) -> None:
    """Remove a file, and those of `folders` that are empty then; the innermost folder comes first."""
    path.unlink(missing_ok=True)
    durable.sync_folder(path.parent)
    for folder in map(Path, folders):
        if _is_empty(folder):
            folder.rmdir()
            durable.sync_folder(folder.parent)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _original(written: WrittenFile) -> bytes | None:
    return None if written.kept is None else Path(written.kept).read_bytes()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _digest(content: bytes | None) -> str:
    return "" if content is None else hashlib.sha256(content).hexdigest()


def _mode(path: Path) -> int | None:
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else None


def _folders(path: Path, record: MirrorRecord) -> tuple[str, ...]:
    """Return the parent folders of a file that do not exist or were made by firstlight earlier, the innermost first."""
    created = {folder for file in record.written for folder in file.folders}
    return tuple(str(folder) for folder in path.parents if not folder.exists() or str(folder) in created)


def _value(root: Root, name: str) -> str | None:
    return variables.read(root).get(name)


def _more(count: int) -> str:
    return f", and {count} more" if count else ""
