"""Reads lock files that are pip requirements: pinned versions, markers and hashes."""

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
    """Describe one pinned package of a lock file: its normalized name and its version."""

    name: str
    version: str


def parse(text: str, python: str, lock: Path) -> list[LockedPackage]:
    """Return the packages in a lock file whose markers match this system and a version of Python.

    Args:
        text: the text of the lock file.
        python: the version of Python, such as "3.12.3".
        lock: the path of the lock file, for the message.

    Raises:
        FirstlightError: a line is not a valid requirement.
    """
    from packaging.markers import UndefinedComparison, UndefinedEnvironmentName, default_environment
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion

    environment: dict[str, str] = dict(default_environment())  # type: ignore[arg-type]  # a TypedDict of str
    environment |= {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    packages = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith(("#", " ", "\t")):
            continue
        try:
            requirement = Requirement(line.rstrip("\\ "))
            applies = requirement.marker is None or requirement.marker.evaluate(environment)
        except (InvalidRequirement, InvalidVersion, UndefinedComparison, UndefinedEnvironmentName) as error:
            raise FirstlightError(f"{lock}, line {number}: {error}. Restore it: git checkout -- {lock}") from error
        pin = re.fullmatch(r"==([^*,]+)", str(requirement.specifier))
        if pin is None:
            raise FirstlightError(f"{lock}, line {number}: no pinned version. Restore it: git checkout -- {lock}")
        if applies:
            packages.append(LockedPackage(normal(requirement.name), pin.group(1)))
    return packages


def hashes(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Return {normalized name of a package: (version, its sha256 digests in hex)} from the text of a lock file.

    A package with two entries, such as for two systems, has the version of the later entry and the digests of both.
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
    """Return the text of a lock file without the entries of some packages, as input for uv.

    Args:
        text: the text of the lock file, in which the hashes of an entry are indented lines below it.
        names: the normalized names of the packages to leave out.
    """
    return split(text, names)[1]


def split(text: str, names: Collection[str]) -> tuple[str, str]:
    """Split the text of a lock file.

    Args:
        text: the text of the lock file.
        names: the normalized names of the selected packages.

    Returns:
        (the lines of the entries of these packages, all other lines).
    """
    selected: list[str] = []
    others: list[str] = []
    lines = others
    for line in text.splitlines():
        if line and not line.startswith((" ", "\t", "#")):
            lines = selected if normal(re.split(r"[=\s;\[]", line, maxsplit=1)[0]) in names else others
        lines.append(line)
    return "\n".join(selected) + "\n", "\n".join(others) + "\n"


def normal(name: str) -> str:
    """Return the normalized name of a package, which is used to compare names.

    Source: the Python packaging specification of names (PEP 503): runs of -, _ and . become -, in lower case.
    """
    return re.sub(r"[-_.]+", "-", name).lower()
