"""Models a file system in memory: nodes (inodes) and names, read from real folders, changed by steps, written back."""

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
    """Hold an inode without its names: `mode` includes the type, `content` is a file's bytes or a link's target."""

    mode: int
    content: bytes = b""
    mtime_ns: int = 0
    attributes: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


@dataclass(frozen=True)
class NameChange:
    """Hold the number of the node that a name in a folder refers to, before and after a step; None: no such name."""

    folder: int
    name: str
    before: int | None
    after: int | None


@dataclass(frozen=True)
class Names:
    """Change one name, or two names atomically; `made` is (number, node) of the node that the step creates, if any."""

    file_system: int
    changes: tuple[NameChange, ...]
    made: tuple[int, Node] | None = None


@dataclass(frozen=True)
class Data:
    """Write bytes at an offset of a file."""

    file_system: int
    node: int
    offset: int
    content: bytes


@dataclass(frozen=True)
class Size:
    """Truncate a file, or extend it with zeros."""

    file_system: int
    node: int
    size: int


@dataclass(frozen=True)
class Status:
    """Change the mode and time of a node, or one extended attribute: (name, value), with None to remove it."""

    file_system: int
    node: int
    mode: int | None = None
    mtime_ns: int | None = None
    attribute: tuple[bytes, bytes | None] | None = None


@dataclass(frozen=True)
class Sync:
    """Sync one node to the disk, or the whole file system if `node` is None."""

    file_system: int
    node: int | None


Step: TypeAlias = Names | Data | Size | Status | Sync


@dataclass
class Disk:
    """Hold the modelled files.

    Attributes:
        tops: {real folder that the model stands for: number of its node}.
        nodes: {number: node}.
        names: {number of a folder: {name: number of the node}}.
    """

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
        """Apply one step to this disk."""
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
        """Yield (path, number, node) for each name; a folder comes before the entries in it."""
        for top, number in self.tops.items():
            if number in self.nodes:
                yield from self._below(str(top), number)

    def _below(self, path: str, number: int) -> Iterator[tuple[str, int, Node]]:
        node = self.nodes[number]
        yield path, number, node
        for name, below in sorted(self.names.get(number, {}).items()):
            yield from self._below(f"{path}/{name}", below)

    def digest(self) -> bytes:
        """Return a hash of the paths, modes, contents, hard links and times of files; equal trees have equal hashes."""
        first: dict[int, str] = {}
        rows = [
            (path, node.mode, node.content, 0 if node.is_folder else node.mtime_ns, first.setdefault(number, path))
            for path, number, node in self.entries()
        ]
        return hashlib.sha256(repr(rows).encode("utf-8", "surrogateescape")).digest()

    def write(self) -> None:
        """Replace the content of the real folders `tops` by this disk's content."""
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
        others = [pair for pair in node.attributes if pair[0] != name]
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
    """Empty a folder, also if a subfolder has a mode that forbids it; make the folder if it is missing."""
    shutil.rmtree(top, ignore_errors=True)
    if top.exists():  # a subfolder whose mode forbids the deletion is left
        for base, folders, _ in os.walk(top):
            for name in folders:
                os.chmod(os.path.join(base, name), 0o700)
        shutil.rmtree(top)
    top.mkdir(parents=True)


def read(tops: Iterable[Path]) -> tuple[Disk, dict[tuple[int, int], int]]:
    """Read real folders; return the disk, and {(device, inode): number of the node}."""
    disk, numbers = Disk(), dict[tuple[int, int], int]()
    for top in tops:
        disk.tops[top] = _read(os.fspath(top), disk, numbers)
    return disk, numbers


def _read(path: str, disk: Disk, numbers: dict[tuple[int, int], int]) -> int:
    status = os.lstat(path)
    inode = (status.st_dev, status.st_ino)
    if inode in numbers:
        return numbers[inode]
    number = numbers[inode] = len(numbers)
    if stat.S_ISDIR(status.st_mode):
        disk.add(number, Node(status.st_mode, mtime_ns=status.st_mtime_ns))
        for name in sorted(os.listdir(path)):
            disk.names[number][name] = _read(f"{path}/{name}", disk, numbers)
        return number
    content, attributes = b"", []
    if stat.S_ISLNK(status.st_mode):
        content = os.fsencode(os.readlink(path))
    elif stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            content = file.read()
        attributes = [
            (os.fsencode(name), os.getxattr(path, name)) for name in os.listxattr(path) if name.startswith("user.")
        ]
    disk.add(number, Node(status.st_mode, content, status.st_mtime_ns, tuple(attributes)))
    return number


def contents(disk: Disk) -> Mapping[str, bytes]:
    """Return {path: bytes} of the regular files."""
    return {path: node.content for path, _, node in disk.entries() if stat.S_ISREG(node.mode)}
