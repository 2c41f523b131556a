"""The few locked files by which a mirror is judged: the largest, the newest and the smallest of each lock."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from provision.config import toml
from provision.lockfiles.requirements import normal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from provision.lockfiles.conda_lock import CondaPackage

_HEADER = """\
# Written by `provision env lock`: the locked files by which `provision mirrors probe` judges a mirror. Do not edit.
"""
_FILE = "witnesses.toml"
# What a machine of the kind that most users have would take of a universal lock.
_FITTING = re.compile(
    r"-(none-any|(cp311|cp3\d+-abi3)-\S*(manylinux\S*_x86_64|macosx\S*(arm64|universal2)|win_amd64))\.whl$"
)
_HASHED_WHOLE = 300_000  # bytes: a smaller file is fetched as a whole, so that its hash can be had


class LockedRow(toml.Strict):
    """Name one file of a lock, and why it was taken."""

    why: str
    name: str
    version: str
    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class LockedRows(toml.Strict):
    """Hold the rows of each lock of an environment: pip's by the name of the lock, conda's by platform."""

    pip: dict[str, list[LockedRow]] = Field(default_factory=dict)
    conda: dict[str, list[LockedRow]] = Field(default_factory=dict)


@dataclass(frozen=True)
class ProbeFile:
    """One locked file. `hashes`: any of them is right. `path`: below the channel, or in the repository.

    `kind` is that of `hashes`: sha256, or git_sha1.
    """

    name: str
    version: str
    why: str
    hashes: frozenset[str]
    size: int | None = None
    path: str | None = None
    kind: str = "sha256"

    @property
    def is_small(self) -> bool:
        """Whether it is fetched as a whole, to have its hash."""
        return self.size is not None and self.size <= _HASHED_WHOLE

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


def read(folder: Path) -> LockedRows:
    """Read the rows of an environment's folder; none where no file names them.

    Raises:
        SpecError: the file is wrong.
    """
    path = folder / _FILE
    return toml.load(path, LockedRows) if path.exists() else LockedRows()


def of_pylock(text: str) -> list[dict[str, object]]:
    """Choose from a lock in PEP 751's form, which tells sizes and times: rows for `write`."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    files = []
    for package in toml.parse_toml(text).get("packages", []):
        for wheel in package.get("wheels", []):
            name = str(wheel.get("name") or wheel.get("url", "")).rpartition("/")[2].replace("%2B", "+")
            try:
                parse_wheel_filename(name)
            except InvalidWheelFilename:
                continue
            if {"size", "upload-time"} <= set(wheel) and _FITTING.search(name):
                files.append(_row(normal(package["name"]), package["version"], name, wheel))
    return _chosen(files)


def _row(name: str, version: str, file: str, wheel: Mapping[str, Any]) -> dict[str, object]:
    digest = str(wheel["hashes"]["sha256"])
    what = {"name": name, "version": version, "file": file, "sha256": digest, "size": int(wheel["size"])}
    return what | {"time": wheel["upload-time"].timestamp()}


def of_solution(packages: Iterable[CondaPackage]) -> dict[str, list[dict[str, object]]]:
    """Choose from solved conda packages: rows for `write`, by platform."""
    by_platform: dict[str, list[dict[str, object]]] = {}
    for each in packages:
        if each.size is not None:
            file = each.url.rpartition("/")[2]
            row = {"name": each.name, "version": each.version, "file": file, "sha256": each.sha256, "size": each.size}
            by_platform.setdefault(each.platform, []).append(row | {"time": each.timestamp or 0})
    return {platform: _chosen(rows) for platform, rows in by_platform.items()}


def write(
    folder: Path, pip: Mapping[str, list[dict[str, object]]], conda: Mapping[str, list[dict[str, object]]]
) -> list[Path]:
    """Write the probe files of an environment, unless none are known; a lock that was not made anew keeps its rows."""
    from provision.fs.atomic import write_atomic

    kept = read(folder)
    tables: dict[str, Mapping[str, object]] = {}
    for kind, fresh, old in (("pip", pip, kept.pip), ("conda", conda, kept.conda)):
        for name in sorted({*fresh, *old}):
            rows = fresh.get(name) or [row.model_dump() for row in old.get(name, [])]
            tables |= {f"{kind}.{name} {number}": row for number, row in enumerate(rows)}
    lines = [_HEADER.rstrip()]
    for title, row in tables.items():
        lines.append(f"\n[[{title.rpartition(' ')[0]}]]")
        lines += [f"{key} = {row[key] if key == 'size' else _quoted(row[key])}" for key in LockedRow.model_fields]
    target = folder / _FILE
    if not tables:
        return []
    write_atomic(target, "\n".join(lines) + "\n")
    return [target]


def _quoted(value: object) -> str:
    return f'"{value}"'


def _chosen(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The largest, the two newest and the smallest, each once."""
    by_size = sorted(rows, key=lambda row: (int(str(row["size"])), str(row["file"])))
    by_time = sorted(rows, key=lambda row: (float(str(row["time"])), str(row["file"])))
    asked = [("largest", by_size[-1:]), ("newest", by_time[-1:]), ("newest but one", by_time[-2:-1])]
    found: dict[object, dict[str, object]] = {}
    for why, some in [*asked, ("smallest", by_size[:1])]:
        for row in some:
            found.setdefault(row["name"], row | {"why": why})
    return list(found.values())
