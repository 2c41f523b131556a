"""Selects, writes and reads the probe files: the few locked files that a probe downloads from a mirror.

They are the largest, the newest and the smallest file of each lock file, in `witnesses.toml` of the lock folder.
"""

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
# The names of wheels for the most common hosts: Python 3.11 on Linux x86-64, macOS arm64 or Windows.
_FITTING = re.compile(
    r"-(none-any|(cp311|cp3\d+-abi3)-\S*(manylinux\S*_x86_64|macosx\S*(arm64|universal2)|win_amd64))\.whl$"
)
_WHOLE_BYTES = 300_000  # a probe downloads the whole file and compares its checksum if it has at most this size


class LockedRow(toml.Strict):
    """Describe one probe file in witnesses.toml.

    `why`: the reason for its selection, such as "largest". `name`, `version`: the package. `file`: the file name.
    `sha256`: in hex. `size`: in bytes.
    """

    why: str
    name: str
    version: str
    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class LockedRows(toml.Strict):
    """Hold the probe files of an environment.

    `pip`: {name of the pip lock file without ".lock": its rows}. `conda`: {conda's name of the platform: its rows}.
    """

    pip: dict[str, list[LockedRow]] = Field(default_factory=dict)
    conda: dict[str, list[LockedRow]] = Field(default_factory=dict)


@dataclass(frozen=True)
class ProbeFile:
    """Describe one locked file that a probe requests.

    `name`, `version`: the package; for a model, the path of the file and "". `why`: the reason for its selection.
    `hashes`: the checksums, one of which the file must have. `kind`: their algorithm, "sha256" or "git_sha1".
    `size`: in bytes; None if it is not known.
    `path`: the official URL of a conda package, or OWNER/NAME/resolve/REVISION/FILE on a hub; None for a wheel.
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
        """Return whether the file is so small that a probe downloads the whole file to compare its checksum."""
        return self.size is not None and self.size <= _WHOLE_BYTES

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


def read(folder: Path) -> LockedRows:
    """Return the probe files of an environment from witnesses.toml in its lock folder; empty without that file.

    Raises:
        SpecError: the file is not valid.
    """
    path = folder / _FILE
    return toml.load(path, LockedRows) if path.exists() else LockedRows()


def select_from_pylock(text: str) -> list[dict[str, object]]:
    """Select the probe files of a pip lock file.

    Args:
        text: the lock file in the format of PEP 751, which has the size and upload time of each file.

    Returns:
        The rows for `write`.
    """
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
    return _select(files)


def _row(name: str, version: str, file: str, wheel: Mapping[str, Any]) -> dict[str, object]:
    digest = str(wheel["hashes"]["sha256"])
    row = {"name": name, "version": version, "file": file, "sha256": digest, "size": int(wheel["size"])}
    return row | {"time": wheel["upload-time"].timestamp()}


def select_from_solution(packages: Iterable[CondaPackage]) -> dict[str, list[dict[str, object]]]:
    """Select the probe files of solved conda packages.

    Returns:
        {conda's name of the platform: the rows for `write`}.
    """
    by_platform: dict[str, list[dict[str, object]]] = {}
    for package in packages:
        if package.size is not None:
            file = package.url.rpartition("/")[2]
            row: dict[str, object] = {"name": package.name, "version": package.version, "file": file}
            row |= {"sha256": package.sha256, "size": package.size, "time": package.timestamp or 0}
            by_platform.setdefault(package.platform, []).append(row)
    return {platform: _select(rows) for platform, rows in by_platform.items()}


def write(
    folder: Path, pip: Mapping[str, list[dict[str, object]]], conda: Mapping[str, list[dict[str, object]]]
) -> list[Path]:
    """Write the probe files of an environment to witnesses.toml; present rows without new ones are kept.

    Args:
        folder: the lock folder of the environment.
        pip: {name of the pip lock file without ".lock": its new rows}.
        conda: {conda's name of the platform: its new rows}.

    Returns:
        [the path of the file], or [] if there are no rows, so that no file is written.
    """
    from provision.fs.atomic import write_atomic

    earlier = read(folder)
    tables: dict[str, Mapping[str, object]] = {}
    for kind, new, old in (("pip", pip, earlier.pip), ("conda", conda, earlier.conda)):
        for name in sorted({*new, *old}):
            rows = new.get(name) or [row.model_dump() for row in old.get(name, [])]
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


def _select(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the rows of the largest file, the two newest and the smallest, each package once, with the key "why"."""
    by_size = sorted(rows, key=lambda row: (int(str(row["size"])), str(row["file"])))
    by_time = sorted(rows, key=lambda row: (float(str(row["time"])), str(row["file"])))
    groups = [("largest", by_size[-1:]), ("newest", by_time[-1:]), ("newest but one", by_time[-2:-1])]
    selected: dict[object, dict[str, object]] = {}
    for why, group in [*groups, ("smallest", by_size[:1])]:
        for row in group:
            selected.setdefault(row["name"], row | {"why": why})
    return list(selected.values())
