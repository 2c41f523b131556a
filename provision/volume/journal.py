"""Writes and reads the journal of a run, an append-only file; each act is on the disk before its change is made."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from provision.core.errors import BlockedError
from provision.fs import durable, records
from provision.volume import run_lock
from provision.volume.journal_acts import Act, IncompleteAct, UnknownAct
from provision.volume.owner import Owner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from provision.volume.journal_acts import ReadAct

# Schema 1 has the start time and pid. Schema 2 adds the command, the host, the home, paths of any bytes (as JSON
# escapes), and the acts that undo reads. The root's path was added to schema 2 later; a line may not have it.
SCHEMA = 2
_MOST_BYTES = 1 << 30
_LATEST = 1 << 40  # seconds since the epoch; a later time is no time


class Journal:
    """Write the journal of one run. The first record creates the file, so a run without changes leaves none."""

    def __init__(self, folder: Path, command: str = "") -> None:
        """Store the journal folder and the name of the command; write nothing yet."""
        self.folder = folder
        self.command = command
        self.path: Path | None = None

    @property
    def backup(self) -> Path:
        """Return the folder for this run's backups; `record` must have been called before."""
        assert self.path is not None  # noqa: S101 (only for the type)
        return self.folder.with_name("backup") / self.path.stem

    def record(self, act: Act) -> None:
        """Append one act to the journal and sync the file, so that the act is on the disk before the change is made.

        Raises:
            LostLockError: another run has taken over the run lock; nothing is written.
        """
        run_lock.require(self.folder.parent)
        lines: list[dict[str, object]] = []
        is_new = self.path is None
        if is_new:
            lines.append(self._begin())
        lines.append({"at": time.time(), **_row(act)})
        assert self.path is not None  # noqa: S101 (only for the type)
        with self.path.open("a", encoding="ascii") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            durable.sync_descriptor(file.fileno())
        if is_new:
            durable.sync_folder(self.folder)

    def _begin(self) -> dict[str, object]:
        # Journal and backups have copies of the user's own settings, which may contain passwords.
        for folder in (self.folder, self.folder.with_name("backup")):
            durable.make_private_folder(folder)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        names = (f"{stamp}-{os.getpid()}{suffix}.jsonl" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        self.path = next(path for path in map(self.folder.joinpath, names) if not path.exists())
        return {
            "schema": SCHEMA,
            "run": self.path.stem,
            "started": stamp,
            "command": self.command,
            "host": platform.node(),
            "pid": os.getpid(),
            "home": str(Path.home()),
            "root": str(self.folder.parent.parent),
        }


@dataclass(frozen=True)
class JournalHeader:
    """Hold the fields of a journal's first line; a field is None if the line does not have it, as in schema 1."""

    started: str | None
    command: str | None
    host: str | None
    home: str | None
    root: str | None = None

    @property
    def owner(self) -> Owner | None:
        """Return the owner of the run; None if the journal does not have the host or the home."""
        return Owner(self.host, self.home) if self.host and self.home else None


@dataclass(frozen=True)
class JournalEntry:
    """Hold one act and its time in seconds since the epoch; 0 if its line has no time."""

    at: float
    act: ReadAct


@dataclass(frozen=True)
class JournalFile:
    """Hold the header and the entries of one journal."""

    header: JournalHeader
    entries: tuple[JournalEntry, ...]


def read_journal(path: Path) -> JournalFile:
    """Read a journal of any schema.

    Lines that are not a JSON object are skipped, since a killed run may leave an incomplete last line. The first JSON
    object is read as the header, even if it is an act.

    Raises:
        BlockedError: the journal is not a regular file, or is too large.
    """
    try:
        content = records.read_bytes(path, most_bytes=_MOST_BYTES, follow_links=False)
    except ValueError as error:
        raise BlockedError(
            f"{path} is not a journal: {error}. Look at this file: ls -l {path}; or move it away."
        ) from None
    rows = []
    for line in content.splitlines():
        with suppress(ValueError):
            rows.append(records.table(records.parse(line)))
    first, *others = rows or [{}]
    texts = {key: value for key, value in first.items() if isinstance(value, str)}
    header = JournalHeader(*map(texts.get, ("started", "command", "host", "home", "root")))
    return JournalFile(header, tuple(JournalEntry(_time(row.get("at")), _act(row)) for row in others))


def _time(value: object) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < _LATEST else 0.0


def _row(act: Act) -> dict[str, object]:
    """Return the JSON object of an act: its name under the key "act", then its fields, with paths as text."""
    return {"act": act.act, **{field.name: _plain(getattr(act, field.name)) for field in fields(act)}}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [str(path) for path in value]
    return str(value) if isinstance(value, Path) else value


def _act(row: Mapping[str, object]) -> ReadAct:
    """Return the act that a JSON object describes; keys that are no fields of the act's record class are ignored."""
    name = str(row.get("act"))
    records = _records().get(name)
    if records is None:
        return UnknownAct(name)
    missing = ""
    for record, readers in records:
        values: dict[str, Any] = {}
        for field, read in readers.items():
            try:
                values[field] = read(row[field])
            except (KeyError, TypeError, ValueError):
                missing = field
                break
        else:
            lists = {field: len(value) for field, value in values.items() if isinstance(value, tuple)}
            if len(set(lists.values())) < 2:
                return record(**values)
            missing = max(lists)  # the lists of an act describe the same paths
    return IncompleteAct(name, missing)


@cache
def _records() -> dict[str, list[tuple[type[Act], dict[str, Callable[[object], object]]]]]:
    """Return {name of an act: [(record class, {field: reader})]}.

    The record class with the most fields comes first, since a JSON object with all its keys also has the keys of the
    other classes. A reader converts a JSON value to the field's value, or raises TypeError.
    """
    records: dict[str, list[tuple[type[Act], dict[str, Callable[[object], object]]]]] = {}
    for record in sorted(get_args(Act), key=lambda record: -len(fields(record))):
        hints = get_type_hints(record)
        readers = {field.name: _READERS[hints[field.name]] for field in fields(record)}
        records.setdefault(record.act, []).append((record, readers))
    return records


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _path(value: object) -> Path:
    return Path(_text(value))


def _paths(value: object) -> tuple[Path, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(_path(path) for path in value)


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(map(_text, value))


def _number(value: object) -> int:
    return records.number(value)


def _optional(read: Callable[[object], object]) -> Callable[[object], object]:
    return lambda value: None if value is None else read(value)


_READERS: dict[object, Callable[[object], object]] = {
    Path: _path,
    Path | None: _optional(_path),
    tuple[Path, ...]: _paths,
    tuple[str, ...]: _texts,
    str: _text,
    str | None: _optional(_text),
    int: _number,
    int | None: _optional(_number),
}
