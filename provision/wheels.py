"""Pinned wheels: what a lock asks for, and whether what is installed still is what each wheel recorded."""

from __future__ import annotations

import csv
import os
import re
from base64 import urlsafe_b64decode
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.errors import FirstlightError
from provision.hashing import differing
from provision.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from provision.progress import Progress

ABSENT = "is not installed"


@dataclass(frozen=True)
class Locked:
    """One pinned package of a lock."""

    name: str
    version: str


def read_lock(lock: Path, python: str) -> list[Locked]:
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
            packages.append(Locked(normal(requirement.name), version))
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


def harmed_packages(
    site: Path, wanted: Sequence[Locked], *, deep: bool, progress: Progress = no_progress
) -> dict[str, str]:
    """{name: reason} of the locked packages that are absent, of another version, or not as recorded.

    Args:
        site: a site-packages folder.
        wanted: what the lock pins.
        deep: hash every file against its RECORD, not only its size.
        progress: told the files and bytes that are hashed.
    """
    there = {}
    for folder in site.glob("*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").partition("-")
        there[normal(name)] = (version, folder)
    harmed = {}
    intact: list[tuple[str, Path]] = []
    for package in wanted:
        if package.name not in there:
            harmed[package.name] = ABSENT
        elif there[package.name][0] != package.version:
            harmed[package.name] = f"is {there[package.name][0]}, the lock wants {package.version}"
        else:
            intact.append((package.name, there[package.name][1]))
    hashed: dict[str, tuple[str, str]] = {}
    digests = []
    for name, info in intact:
        # 20,000 calls of stat hold Python's lock: they are quicker in one thread.
        reason = _stat_record(info)
        if reason:
            harmed[name] = reason
        elif deep:
            for path, digest in _digests(info):
                whole = f"{info.parent}{os.sep}{path}"
                hashed[whole] = (name, path)
                digests.append((whole, digest))
    for whole in differing(digests, progress):
        name, path = hashed[whole]
        harmed.setdefault(name, f"{path} does not have its recorded content")
    return harmed


def _digests(info: Path) -> list[tuple[str, bytes]]:
    """(path, sha256) of every recorded file."""
    rows = [(path, digest.partition("=")) for path, digest, _ in _record(info)]
    return [(path, urlsafe_b64decode(f"{digest}=")) for path, (kind, _, digest) in rows if kind == "sha256"]


def _stat_record(info: Path) -> str | None:
    """The first recorded file that is missing or has another size."""
    site = f"{info.parent}{os.sep}"
    for path, _, size in _record(info):
        try:
            found = os.stat(site + path).st_size  # noqa: PTH116 (20,000 files in a tenth of a second)
        except OSError:
            return f"{path} is missing"
        if size and int(size) != found:
            return f"{path} is {found} bytes, recorded with {size}"
    return None if (info / "RECORD").exists() else "its RECORD is missing"


def _record(info: Path) -> list[tuple[str, str, str]]:
    """(path, digest, size) of every file that a package recorded, its compiled bytecode left out."""
    try:
        text = (info / "RECORD").read_text(encoding="utf-8")
    except OSError:
        return []
    # Nearly every line is three plain fields; only a path with a comma in it is quoted.
    rows = text.splitlines() if '"' not in text else csv.reader(text.splitlines())
    fields = [row.split(",") if isinstance(row, str) else row for row in rows]
    return [(row[0], row[1], row[2]) for row in fields if len(row) == 3 and not row[0].endswith(".pyc")]


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
