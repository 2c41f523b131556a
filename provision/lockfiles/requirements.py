"""Reads lock files of pip requirements: pinned versions, markers and hashes."""

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
    """Describe one pinned package of a lock file."""

    name: str
    version: str


def parse(text: str, python: str, lock: Path) -> list[LockedPackage]:
    """Return the packages that a lock's text pins for this system and the given Python version.

    Args:
        text: the lock's.
        python: such as 3.12.3.
        lock: the file that the text is of, for the message.

    Raises:
        FirstlightError: a line is no pinned requirement.
    """
    from packaging.markers import default_environment
    from packaging.requirements import InvalidRequirement, Requirement

    environment: dict[str, str] = dict(default_environment())  # type: ignore[arg-type]  # a TypedDict of str
    environment |= {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    packages = []
    for number, line in enumerate(text.splitlines(), start=1):
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
    """Return {package: (version, its sha256 digests)} of a lock file's text.

    A package with two entries gets the version of the later one and the digests of both.
    """
    packages: dict[str, tuple[str, frozenset[str]]] = {}
    name = version = ""
    for line in text.splitlines():
        entry = re.match(r"([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", line)
        if entry:
            name, version = normal(entry.group(1)), entry.group(2)
            packages[name] = (version, packages.get(name, ("", frozenset()))[1])
        if name:
            digests = frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", line))
            packages[name] = (version, packages[name][1] | digests)
    return packages


def without(text: str, names: Collection[str]) -> str:
    """Return a lock's text without the entries of some packages, for uv to read.

    Args:
        text: of a lock of pinned requirements, an entry's hashes indented below it.
        names: normalised names.
    """
    return split(text, names)[1]


def split(text: str, names: Collection[str]) -> tuple[str, str]:
    """Return (the entries of some packages, the other lines) of a lock file's text; `names` are normalized."""
    selected: list[str] = []
    others: list[str] = []
    lines = others
    for line in text.splitlines():
        if line and not line.startswith((" ", "\t", "#")):
            lines = selected if normal(re.split(r"[=\s;\[]", line, maxsplit=1)[0]) in names else others
        lines.append(line)
    return "\n".join(selected) + "\n", "\n".join(others) + "\n"


def normal(name: str) -> str:
    """Return the normalized name of a package, by which indexes compare names.

    Source: the Python packaging specification of names (PEP 503): runs of -, _ and . become -, in lower case.
    """
    return re.sub(r"[-_.]+", "-", name).lower()
