"""Pinned wheels: what a lock asks for, and whether what is installed still is what each wheel recorded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.errors import FirstlightError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path


@dataclass(frozen=True)
class LockedPackage:
    """One pinned package of a lock."""

    name: str
    version: str


def read_lock(lock: Path, python: str) -> list[LockedPackage]:
    """The packages that a lock pins for this system and the given Python version.

    Raises:
        FirstlightError: the lock is not there, or a line is no pinned requirement.
    """
    from packaging.markers import default_environment
    from packaging.requirements import InvalidRequirement, Requirement

    environment: dict[str, str] = dict(default_environment())  # type: ignore[arg-type]  # a TypedDict of str
    environment |= {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    packages = []
    try:
        lines = lock.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FirstlightError(f"{lock} cannot be read: {error.strerror}. Restore it: git checkout -- {lock}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(("#", " ", "\t")):
            continue
        try:
            requirement = Requirement(line.rstrip("\\ "))
        except InvalidRequirement as error:
            raise FirstlightError(f"{lock}, line {number}: {error}. Restore it: git checkout -- {lock}") from error
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = str(requirement.specifier).removeprefix("==")
            packages.append(LockedPackage(normal(requirement.name), version))
    return packages


def hashes(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """{package: (version, the sha256 that are right for it)} of a lock's text; of two versions, the later entry's."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    name = version = ""
    for line in text.splitlines():
        entry = re.match(r"([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", line)
        if entry:
            name, version = normal(entry.group(1)), entry.group(2)
            found[name] = (version, found.get(name, ("", frozenset()))[1])
        if name:
            digests = frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
            found[name] = (version, found[name][1] | digests)
    return found


def without(lock: Path, names: Collection[str]) -> str:
    """A lock's text without the entries of some packages, for uv to read.

    Args:
        lock: a lock of pinned requirements, an entry's hashes indented below it.
        names: normalised names.
    """
    return split(lock.read_text(encoding="utf-8"), names)[1]


def split(text: str, names: Collection[str]) -> tuple[str, str]:
    """Return the entries of some packages of a lock's text, and the other lines; `names` are normalised."""
    named: list[str] = []
    others: list[str] = []
    lines = others
    for line in text.splitlines():
        if line and not line.startswith((" ", "\t", "#")):
            lines = named if normal(re.split(r"[=\s;\[]", line, maxsplit=1)[0]) in names else others
        lines.append(line)
    return "\n".join(named) + "\n", "\n".join(others) + "\n"


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
