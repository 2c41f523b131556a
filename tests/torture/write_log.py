"""Compiles the recorder of writes, runs a program under it, and converts the log to steps of a modelled disk."""

from __future__ import annotations

import itertools
import os
import stat
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.torture import disk
from tests.torture.disk import Data, Disk, NameChange, Names, Node, Size, Status, Step, Sync

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_FIXED = struct.Struct("<c10Q")


@dataclass(frozen=True)
class Recording:
    """Hold the changes that a program has made to some folders: the disk before the program, and the steps in order."""

    before: Disk
    steps: tuple[Step, ...]

    def after(self) -> Disk:
        """Return a new disk, on which all steps are applied."""
        disk_after = self.before.copy()
        for step in self.steps:
            disk_after.apply(step)
        return disk_after


def build(folder: Path) -> Path:
    """Compile the recorder with gcc into a folder, and return the path of the library.

    Raises:
        FileNotFoundError: gcc is missing.
        subprocess.CalledProcessError: the compilation failed.
    """
    library = folder / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    argv = ["gcc", *flags, "-o", str(library), str(source), "-ldl", "-lpthread"]
    subprocess.run(argv, check=True, capture_output=True, text=True)
    return library


def record(
    library: Path, argv: Sequence[str], tops: Mapping[Path, int], log: Path, environ: Mapping[str, str] | None = None
) -> Recording:
    """Run a program under the recorder and return its changes.

    Args:
        library: the compiled recorder.
        argv: the program and its arguments.
        tops: {recorded folder: number of the file system that it simulates}.
        log: the path of the log, which is outside of the recorded folders.
        environ: environment variables to add to those of this process.

    Raises:
        AssertionError: the program failed, or a change was not recorded.
    """
    log.unlink(missing_ok=True)
    before, numbers = disk.read(tops)
    variables = {**os.environ, **(environ or {}), "LD_PRELOAD": str(library), "WRITE_LOG": str(log)}
    completed = subprocess.run(argv, env=variables, check=False, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    steps = _Reader(before, numbers, {before.tops[top]: number for top, number in tops.items()})
    recording = Recording(before, tuple(steps.read(log.read_bytes())))
    real, _ = disk.read(tops)
    expected, present = recording.after(), {path: node for path, _, node in real.entries()}
    different = [
        path
        for path, _, node in expected.entries()
        if path not in present or (node.mode, node.content) != (present[path].mode, present[path].content)
    ]
    missing = set(present) - {path for path, _, _ in expected.entries()}
    assert not different, f"writes to these paths bypassed the recorder: {different}"
    assert not missing, f"the creation of these paths bypassed the recorder: {missing}"
    return recording


class _Reader:
    """Converts the records of a log to steps.

    It tracks nodes by device and inode; an inode number that the file system uses again becomes a new node.
    """

    def __init__(self, before: Disk, numbers: dict[tuple[int, int], int], tops: dict[int, int]) -> None:
        self.now = before.copy()
        self.numbers = dict(numbers)
        self.fresh = itertools.count(len(numbers))
        self.file_systems = {number: file_system for top, file_system in tops.items() for number in _below(before, top)}

    def read(self, log: bytes) -> Iterator[Step]:
        half: list[tuple[list[int], bytes, bytes]] = []
        for kind, fields, first, second in _records(log):
            if kind == b"N":
                half.append((fields, first, second))
                if fields[7]:
                    continue
                steps, half = list(self._names(half)), []
            else:
                steps = list(self._other(kind, fields, first, second))
            for step in steps:
                self.now.apply(step)
                yield step

    def _names(self, rows: list[tuple[list[int], bytes, bytes]]) -> Iterator[Step]:
        changes, made, file_system = [], None, 0
        if not any((fields[0], fields[1]) in self.numbers for fields, _, _ in rows):
            for fields, _, _ in rows:
                if fields[6]:
                    self.numbers.pop((fields[2], fields[3]), None)
            return
        for fields, raw, target in rows:
            one, name = (fields[2], fields[3]), os.fsdecode(raw)
            assert (fields[0], fields[1]) in self.numbers, "a path was renamed into or out of the recorded folders"
            folder = self.numbers[fields[0], fields[1]]
            file_system = self.file_systems[folder]
            after = None
            if fields[3] and fields[6]:
                after = self.numbers[one] = next(self.fresh)
                self.file_systems[after] = file_system
                content = target if stat.S_ISLNK(fields[4]) else b""
                made = (after, Node(fields[4], content, fields[9]))
            elif fields[3]:
                after = self.numbers[one]
            changes.append(NameChange(folder, name, self.now.names[folder].get(name), after))
        yield Names(file_system, tuple(changes), made)

    def _other(self, kind: bytes, fields: list[int], first: bytes, second: bytes) -> Iterator[Step]:
        number = self.numbers.get((fields[0], fields[1]))
        if kind == b"Y":
            for file_system in set(self.file_systems.values()):
                yield Sync(file_system, None)
            return
        if number is None:
            return
        where = self.file_systems[number]
        if kind == b"W":
            yield Data(where, number, fields[2], first)
        elif kind == b"T":
            yield Size(where, number, fields[2])
        elif kind == b"A":
            yield Status(where, number, fields[3], fields[5])
        elif kind == b"X":
            yield Status(where, number, attribute=(first, None if fields[2] else second))
        else:
            yield Sync(where, number if kind == b"S" else None)


def _below(before: Disk, top: int) -> Iterator[int]:
    yield top
    for number in before.names.get(top, {}).values():
        yield from _below(before, number)


def _records(log: bytes) -> Iterator[tuple[bytes, list[int], bytes, bytes]]:
    at = 0
    while at < len(log):
        (rest,) = struct.unpack_from("<I", log, at)
        kind, *fields = _FIXED.unpack_from(log, at + 4)
        place = at + 4 + _FIXED.size
        texts = []
        for _ in range(2):
            (size,) = struct.unpack_from("<I", log, place)
            texts.append(log[place + 4 : place + 4 + size])
            place += 4 + size
        yield kind, fields, *texts
        at += 4 + rest
