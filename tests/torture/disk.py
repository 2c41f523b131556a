"""A file system as a tree of nodes: read from folders, changed by steps, and written out again."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Node:
    """One inode without its names: `mode` has the type too, `content` is a file's bytes or a link's target."""

    mode: int
    content: bytes = b""
    mtime_ns: int = 0
    attributes: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


@dataclass(frozen=True)
class NameChange:
    """What one name in a folder stands for before and after a step: a node's number, or None."""

    folder: int
    name: str
    before: int | None
    after: int | None


@dataclass(frozen=True)
class Names:
    """A step that changes one name, or two of them at once; `made` is the node that it creates."""

    file_system: int
    changes: tuple[NameChange, ...]
    made: tuple[int, Node] | None = None


@dataclass(frozen=True)
class Data:
    """A step that writes bytes at an offset of a file."""

    file_system: int
    node: int
    offset: int
    content: bytes


@dataclass(frozen=True)
class Size:
    """A step that cuts a file, or extends it with zeros."""

    file_system: int
    node: int
    size: int


@dataclass(frozen=True)
class Status:
    """A step that changes a node's mode, time or extended attributes."""

    file_system: int
    node: int
    mode: int | None = None
    mtime_ns: int | None = None
    attribute: tuple[bytes, bytes | None] | None = None


@dataclass(frozen=True)
class Sync:
    """A step that forces one node to the disk, or (node None) a whole file system."""

    file_system: int
    node: int | None


Step: TypeAlias = Names | Data | Size | Status | Sync


@dataclass
class Disk:
    """Every node by its number, and the names in each folder. `tops` are the folders that are looked at."""

    tops: dict[Path, int] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=dict)

    def copy(self) -> Disk:
        return Disk(self.tops, dict(self.nodes), {number: dict(below) for number, below in self.names.items()})

    def add(self, number: int, node: Node) -> None:
        self.nodes[number] = node
        if node.is_folder:
            self.names[number] = {}

    def apply(self, step: Step) -> None:
        """Make a change as it was made, whatever became of those before it."""
        match step:
            case Names():
                if step.made is not None:
                    self.add(*step.made)
                for change in step.changes:
                    below = self.names[change.folder]
                    below.pop(change.name, None)
                    if change.after is not None:
                        below[change.name] = change.after
            case Data():
                node = self.nodes[step.node]
                head = node.content[: step.offset].ljust(step.offset, b"\0")
                tail = node.content[step.offset + len(step.content) :]
                self.nodes[step.node] = replace(node, content=head + step.content + tail)
            case Size():
                node = self.nodes[step.node]
                content = node.content[: step.size].ljust(step.size, b"\0")
                self.nodes[step.node] = replace(node, content=content)
            case Status():
                self.nodes[step.node] = _with_status(self.nodes[step.node], step)
            case Sync():
                pass

    def entries(self) -> Iterator[tuple[str, int, Node]]:
        """(path, number, node) of all that has a name; a folder comes before what lies in it."""
        for top, number in self.tops.items():
            if number in self.nodes:
                yield from self._below(str(top), number)

    def _below(self, path: str, number: int) -> Iterator[tuple[str, int, Node]]:
        node = self.nodes[number]
        yield path, number, node
        for name, below in sorted(self.names.get(number, {}).items()):
            yield from self._below(f"{path}/{name}", below)

    def digest(self) -> bytes:
        """Return what two equal trees share."""
        first: dict[int, str] = {}
        seen = [
            (path, node.mode, node.content, 0 if node.is_folder else node.mtime_ns, first.setdefault(number, path))
            for path, number, node in self.entries()
        ]
        return hashlib.sha256(repr(seen).encode("utf-8", "surrogateescape")).digest()

    def write(self) -> None:
        """Let the real folders be this tree."""
        for top in self.tops:
            clear(top)
        first: dict[int, str] = {}
        modes: list[tuple[str, int]] = []
        for path, number, node in self.entries():
            if number in first:
                os.link(first[number], path, follow_symlinks=False)
                continue
            first[number] = path
            if node.is_folder:
                os.makedirs(path, exist_ok=True)
                modes.append((path, node.mode))
                continue
            _write(path, node)
        for path, mode in reversed(modes):
            os.chmod(path, stat.S_IMODE(mode))


def _with_status(node: Node, step: Status) -> Node:
    if step.attribute is not None:
        name, value = step.attribute
        others = [each for each in node.attributes if each[0] != name]
        return replace(node, attributes=tuple(sorted([*others, *([] if value is None else [(name, value)])])))
    assert step.mode is not None
    return replace(node, mode=step.mode, mtime_ns=step.mtime_ns or 0)


def _write(path: str, node: Node) -> None:
    if stat.S_ISLNK(node.mode):
        os.symlink(node.content, os.fsencode(path))
    elif not stat.S_ISREG(node.mode):
        os.mknod(path, node.mode)
    else:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(file, node.content)
            for name, value in node.attributes:
                os.setxattr(file, name, value)
            os.fchmod(file, stat.S_IMODE(node.mode))
        finally:
            os.close(file)
    os.utime(path, ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)


def clear(top: Path) -> None:
    """Take all away that lies in a folder, whatever modes it has; make the folder where it is not there."""
    shutil.rmtree(top, ignore_errors=True)
    if top.exists():  # a folder without rights
        for base, folders, _ in os.walk(top):
            for name in folders:
                os.chmod(os.path.join(base, name), 0o700)
        shutil.rmtree(top)
    top.mkdir(parents=True)


def read(tops: Iterable[Path]) -> tuple[Disk, dict[tuple[int, int], int]]:
    """Return the disk that these folders are, and {(device, inode): number of the node}."""
    disk, numbers = Disk(), dict[tuple[int, int], int]()
    for top in tops:
        disk.tops[top] = _read(os.fspath(top), disk, numbers)
    return disk, numbers


def _read(path: str, disk: Disk, numbers: dict[tuple[int, int], int]) -> int:
    found = os.lstat(path)
    one = (found.st_dev, found.st_ino)
    if one in numbers:
        return numbers[one]
    number = numbers[one] = len(numbers)
    if stat.S_ISDIR(found.st_mode):
        disk.add(number, Node(found.st_mode, mtime_ns=found.st_mtime_ns))
        for name in sorted(os.listdir(path)):
            disk.names[number][name] = _read(f"{path}/{name}", disk, numbers)
        return number
    content, attributes = b"", []
    if stat.S_ISLNK(found.st_mode):
        content = os.fsencode(os.readlink(path))
    elif stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            content = file.read()
        attributes = [
            (os.fsencode(name), os.getxattr(path, name)) for name in os.listxattr(path) if name.startswith("user.")
        ]
    disk.add(number, Node(found.st_mode, content, found.st_mtime_ns, tuple(attributes)))
    return number


def contents(disk: Disk) -> Mapping[str, bytes]:
    """{path: bytes} of every regular file."""
    return {path: node.content for path, _, node in disk.entries() if stat.S_ISREG(node.mode)}
