"""Writes the chosen mirrors where tools look, in the environment and in the user's files, and takes it all back."""

from __future__ import annotations

import difflib
import hashlib
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.errors import SpecError
from provision.core.step import Check, State
from provision.fs.atomic import write_atomic
from provision.mirrors import record as mirror_record
from provision.mirrors.record import MirrorRecord, WrittenFile
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

_EDITED = "edited since"


def mirror_variables(record: MirrorRecord) -> dict[str, str]:
    """Return the variables that name the chosen mirrors, in the order of the tools."""
    found: dict[str, str] = {}
    for tool in all_tools.TOOLS:
        source = record.chosen(tool.name)
        if not source.is_official:
            found |= tool.variables(source)
    return found


def targets(
    record: MirrorRecord, prefix: Path, home: Path, environ: Mapping[str, str], *, conda_is_here: bool
) -> list[ConfigFile]:
    """Return every file that names a mirror: those of the environment first, then the user's.

    Besides the files of each tool there are those that set variables in an environment: one that python runs when it
    starts, and in conda's environments the scripts that run at activation.
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
    """Return every variable that we may have set."""
    return [name for group in all_tools.variable_groups() for name in group.names]


class SettingsStep:
    """Every file that tells a tool of its mirror says the chosen one, and nothing of the user's is lost in it."""

    name = "mirror settings"
    essential = False
    local = True

    def __init__(
        self, root: Root, prefix: Path, home: Path, environ: Mapping[str, str], journal: Journal, *, conda_is_here: bool
    ) -> None:
        """Take the environment, and the home whose files are meant."""
        self.root, self.prefix, self.home, self.environ = root, prefix, home, environ
        self.journal = journal
        self.conda_is_here = conda_is_here

    def describe(self) -> str:
        """The plan's line."""
        return "write the chosen mirrors into pip's, conda's and uv's settings"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (files are read whole)
        """Compare each file with what it should hold."""
        record = mirror_record.read(self.root) or MirrorRecord()
        drifted = [str(target.path) for target in self._targets(record) if _differs(target, record)]
        drifted += [name for name, value in self._variables(record).items() if _kept(self.root, name) != value]
        own = [f"{tool}: {choice.why}" for tool, choice in record.choices.items() if not choice.sources]
        for name, told in ({} if record.restored else mirror_variables(record)).items():
            if self.environ.get(name) not in {None, "", told}:
                own.append(f"{name} is set in this shell and wins over the mirror: unset {name}")
        if drifted:
            return Check(State.DRIFTED, f"{drifted[0]} does not say it{_more(len(drifted) - 1)}")
        overridden = any(not choice.first.is_official for choice in record.choices.values())
        detail = f"{len(record.written)} files say it" if overridden else "nothing is overridden"
        return Check(State.OK, detail, "; ".join(own) or None)

    def apply(self) -> None:
        """Write what is not as it should be; the earlier bytes are kept for `mirrors restore`, and for `undo`."""
        record = mirror_record.read(self.root) or MirrorRecord()
        for target in self._targets(record):
            if _differs(target, record):
                record = self._write(target, record)
        for name, value in self._variables(record).items():
            if _kept(self.root, name) != value:
                variables.set_value(self.root, name, value, self.journal)

    def _targets(self, record: MirrorRecord) -> list[ConfigFile]:
        if record.restored or not record.choices:
            return []
        every = targets(record, self.prefix, self.home, self.environ, conda_is_here=self.conda_is_here)
        return [replace(target, path=target.path.resolve()) for target in every]

    def _variables(self, record: MirrorRecord) -> dict[str, str | None]:
        """What each of our variables should be; None: not set."""
        told = {} if record.restored else mirror_variables(record)
        held = variables.read(self.root)
        return {name: told.get(name) for name in _variable_names() if name in told or name in held}

    def _write(self, target: ConfigFile, record: MirrorRecord) -> MirrorRecord:
        path = target.path
        now = _read(path)
        base, known = _base(path, record)
        content = target.render(base or b"")
        after = content if content or base is not None else None
        folders = known.folders if known else _folders(path, record)
        is_pristine = known is None or base == _original(known)
        if known is None:
            known = WrittenFile(str(path), self._keep_original(base, record), _mode(path), "", folders)
        # Where somebody has written since, no content is ours alone: then `restore` asks before it takes it away.
        known = replace(known, sha256=_digest(after) if is_pristine else _EDITED)
        others = tuple(each for each in record.written if each.path != str(path))
        is_back = is_pristine and after == base
        whole = replace(record, written=others if is_back else (*others, known))
        keep_backup(mirror_record.file_of(self.root), mirror_record.text_of(whole).encode(), self.journal)
        mirror_record.write(self.root, whole)
        make_folders(path.parent, self.journal)
        keep_backup(path, after, self.journal)
        if after is None:
            _remove(path, known.folders)
        elif after != now:
            write_atomic(path, after, like=path.stat() if now is not None else None)
        return whole

    def _keep_original(self, content: bytes | None, record: MirrorRecord) -> str | None:
        if content is None:
            return None
        place = self.root.state / "mirrors" / f"original-{len(record.written) + 1}-{_digest(content)[:12]}"
        write_atomic(place, content, private=True)
        return str(place)


class RestoreFileStep:
    """A file that we changed holds the bytes, and has the mode, from before us; or is absent again."""

    essential = False
    local = True

    def __init__(self, written: WrittenFile, journal: Journal, *, force: bool) -> None:
        """Take what was written; `force`: what the user changed since is kept beside it."""
        self.name = f"restore {Path(written.path).name}"
        self.written = written
        self.path = Path(written.path)
        self.journal = journal
        self.force = force

    def describe(self) -> str:
        """The plan's line."""
        return f"put back {self.path}" if self.written.kept else f"take {self.path} away"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a file is read whole)
        """Compare it with what we left and with what was before us."""
        now, before = _read(self.path), _original(self.written)
        mode_is_right = now is None or self.written.mode is None or _mode(self.path) == self.written.mode
        if now == before and mode_is_right:
            return Check(State.OK, f"{self.path} is as it was")
        if now is None or now == before or _digest(now) == self.written.sha256 or self.force:
            return Check(State.DRIFTED, f"{self.path} holds what was written for mirrors")
        old, new = ((text or b"").decode(errors="replace").splitlines() for text in (now, before))
        diff = "\n".join(difflib.unified_diff(old, new, f"{self.path} now", f"{self.path} before", lineterm=""))
        return Check(
            State.BLOCKED, f"{self.path} was changed since. --force keeps it beside, and puts the earlier back:\n{diff}"
        )

    def apply(self) -> None:
        """Write the earlier bytes."""
        now, before = _read(self.path), _original(self.written)
        if now is not None and now != before and _digest(now) != self.written.sha256:
            places = (self.path.with_name(f"{self.path.name}.firstlight-kept-{n}") for n in range(1, 1000))
            aside = next(place for place in places if not place.exists())
            write_atomic(aside, now, like=self.path.stat())
        make_folders(self.path.parent, self.journal)
        keep_backup(self.path, before, self.journal)
        if before is None:
            _remove(self.path, self.written.folders)
            return
        write_atomic(self.path, before, like=self.path.stat() if now is not None else None)
        if self.written.mode is not None:
            self.path.chmod(self.written.mode)


class RestoreChoiceStep:
    """No mirror is chosen any more, and setup chooses none by itself."""

    name = "mirrors"
    essential = False
    local = True

    def __init__(self, root: Root, journal: Journal) -> None:
        """Take the volume."""
        self.root = root
        self.journal = journal

    def describe(self) -> str:
        """The plan's line."""
        return "forget the chosen mirrors"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (there is nothing deeper)
        """Look at the record, and at the variables."""
        record = mirror_record.read(self.root)
        if record is not None and not record.restored:
            return Check(State.DRIFTED, "mirrors are chosen")
        if set(_variable_names()) & set(variables.read(self.root)):
            return Check(State.DRIFTED, "variables name a mirror")
        return Check(State.OK, "every tool asks what it asked before")

    def apply(self) -> None:
        """Forget them."""
        for name in _variable_names():
            if name in variables.read(self.root):
                variables.set_value(self.root, name, None, self.journal)
        record = MirrorRecord(restored=True)
        keep_backup(mirror_record.file_of(self.root), mirror_record.text_of(record).encode(), self.journal)
        mirror_record.write(self.root, record)


def restoring(root: Root, journal: Journal, *, force: bool) -> list[Step]:
    """What takes everything back, the choice last."""
    record = mirror_record.read(root) or MirrorRecord()
    return [*(RestoreFileStep(each, journal, force=force) for each in record.written), RestoreChoiceStep(root, journal)]


def _differs(target: ConfigFile, record: MirrorRecord) -> bool:
    base, known = _base(target.path, record)
    try:
        wanted = target.render(base or b"")
    except SpecError as error:
        raise SpecError(f"{target.path}: {error}") from None
    now = _read(target.path)
    if now is None and wanted == (base or b""):
        return False  # it was taken away, and nothing of ours belongs into it
    if not wanted and known is not None and _original(known) is None:
        return now is not None
    return wanted != (now or b"")


def _base(path: Path, record: MirrorRecord) -> tuple[bytes | None, WrittenFile | None]:
    """The content that ours is put into: what was before us, unless somebody else has written since.

    A file that was wiped comes back with what the user had in it.
    """
    now = _read(path)
    known = next((each for each in record.written if each.path == str(path)), None)
    if known is None:
        return now, None
    before = _original(known)
    if now is None or now == before or _digest(now) == known.sha256:
        return before, known
    return now, known


def _remove(path: Path, folders: Sequence[str]) -> None:
    """Take a file away, and the folders that were made for it where nothing else has come into them."""
    path.unlink(missing_ok=True)
    for folder in map(Path, folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


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
    """The folders above a file that we make, or have made for another one: the innermost first."""
    made = {each for written in record.written for each in written.folders}
    return tuple(str(folder) for folder in path.parents if not folder.exists() or str(folder) in made)


def _kept(root: Root, name: str) -> str | None:
    return variables.read(root).get(name)


def _more(count: int) -> str:
    return f", and {count} more" if count else ""
