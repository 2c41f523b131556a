"""Maps the paths in a journal to present paths: the volume may have another mount point now, the home another path."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.volume.journal_acts import FileChange, FolderMerge, VolumeMark

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from provision.core.layout import Root
    from provision.volume.journal import JournalHeader
    from provision.volume.journal_acts import ReadAct

_STATE = ".firstlight"


@dataclass(frozen=True)
class PathMap:
    """Map paths at the time of a run to present paths; `pairs` are (earlier path, present path) of folders."""

    pairs: tuple[tuple[Path, Path], ...] = ()

    def path(self, path: Path) -> Path:
        """Return the present path of `path`, a path at the time of the run; outside of the pairs, `path` itself."""
        return _rebased(path, self.pairs)

    def earlier(self, path: Path) -> Path:
        """Return the path that the present path `path` had at the time of the run."""
        return _rebased(path, tuple((present, earlier) for earlier, present in self.pairs))

    def earlier_text(self, text: str | None) -> str | None:
        """Return the path at the time of the run if `text` is an absolute path; any other text unchanged."""
        return str(self.earlier(Path(text))) if text is not None and text.startswith("/") else text

    def act(self, act: ReadAct) -> ReadAct:
        """Return the act with present paths in its fields; texts that are absolute paths are mapped, too."""
        changes: dict[str, Any] = {field.name: self._value(getattr(act, field.name)) for field in fields(act)}
        return replace(act, **changes)

    def _value(self, value: object) -> object:
        if isinstance(value, Path):
            return self.path(value)
        if isinstance(value, tuple):
            return tuple(self._value(item) for item in value)
        # The earlier target of a link, and the value of a variable, are texts; most are absolute paths.
        return str(self.path(Path(value))) if isinstance(value, str) and value.startswith("/") else value


def earlier_root(header: JournalHeader, run_acts: Sequence[ReadAct], root: Root, others: Iterable[Path]) -> Path | None:
    """Return the path that the root had at the time of a run; None if it is the present path, or is unknown.

    Args:
        header: the header of the run's journal, which has the path unless an older version wrote the journal.
        run_acts: the acts of the run; the paths of their backups, and of the marker, show the path of the root, too.
        root: the root at its present path.
        others: the paths that the root had in other runs. If nothing else shows the path, the first of them that
            contains a path of an act is returned.
    """
    candidates = [*([Path(header.root)] if header.root else []), *roots_in(run_acts)]
    paths = [path for act in run_acts for path in _paths(act)]
    if not candidates and not any(path.is_relative_to(root.path) for path in paths):
        candidates = [other for other in others if any(path.is_relative_to(other) for path in paths)]
    return candidates[0] if candidates and candidates[0] != root.path else None


def roots_in(run_acts: Iterable[ReadAct]) -> Iterator[Path]:
    """Yield the paths of the root that the acts show by the marker, or by a file in the root's folder of backups."""
    for act in run_acts:
        if isinstance(act, VolumeMark):
            yield act.volume
        file = act.backup if isinstance(act, FileChange) else act.manifest if isinstance(act, FolderMerge) else None
        if file is not None and _STATE in file.parts:
            yield Path(*file.parts[: file.parts.index(_STATE)])


def _paths(act: ReadAct) -> Iterator[Path]:
    for field in fields(act):
        value = getattr(act, field.name)
        yield from (item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, Path))


def _rebased(path: Path, pairs: Sequence[tuple[Path, Path]]) -> Path:
    for earlier, present in sorted(pairs, key=lambda pair: -len(pair[0].parts)):
        if path.is_relative_to(earlier):
            return present / path.relative_to(earlier)
    return path
