"""The few locked files by which a mirror is judged: the largest, the newest and the smallest of each lock."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from provision.config import toml
from provision.lockfiles.requirements import normal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from provision.config.models import ModelSpec
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


class _Row(toml.Strict):
    """One file of a lock, and why it was taken."""

    why: str
    name: str
    version: str
    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class _Rows(toml.Strict):
    """Those of one lock; of conda's by platform."""

    pip: dict[str, list[_Row]] = Field(default_factory=dict)
    conda: dict[str, list[_Row]] = Field(default_factory=dict)


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


def of_pip(folder: Path, lock: str, hashes: Mapping[str, tuple[str, frozenset[str]]]) -> list[ProbeFile]:
    """The probe files of a pip lock; without a file that names them, the lock's first packages.

    Args:
        folder: the environment's, with its locks.
        lock: the lock's name, such as "cu130".
        hashes: {package: (version, its hashes)} of the lock.
    """
    # A lock may hold two versions of a package, for two Pythons: the hash tells.
    rows = [row for row in _read(folder).pip.get(lock, []) if row.sha256 in hashes.get(row.name, ("", ()))[1]]
    if rows:
        return [ProbeFile(row.name, row.version, row.why, frozenset({row.sha256}), row.size) for row in rows]
    first = sorted(name for name, (version, _) in hashes.items() if "+" not in version)[:3]
    return [ProbeFile(name, hashes[name][0], "locked", hashes[name][1]) for name in first]


def of_torch(hashes: Mapping[str, tuple[str, frozenset[str]]]) -> list[ProbeFile]:
    """What of a lock comes from PyTorch's own index: the builds with a local version, such as 2.13.0+cpu."""
    return [ProbeFile(name, version, "build", right) for name, (version, right) in hashes.items() if "+" in version]


def of_conda(folder: Path, platform: str, packages: Sequence[CondaPackage]) -> list[ProbeFile]:
    """The probe files of a conda lock for one platform; without a file that names them, the lock's first packages."""
    locked = {package.sha256: package for package in packages}
    rows = [row for row in _read(folder).conda.get(platform, []) if row.sha256 in locked]
    if rows:
        return [
            ProbeFile(row.name, row.version, row.why, frozenset({row.sha256}), row.size, locked[row.sha256].url)
            for row in rows
        ]
    return [
        ProbeFile(each.name, each.version, "locked", frozenset({each.sha256}), None, each.url) for each in packages[:3]
    ]


def of_models(models: Iterable[ModelSpec]) -> list[ProbeFile]:
    """The largest and the smallest pinned file of the models; `path` is OWNER/NAME/resolve/REVISION/FILE."""
    pinned = [
        ProbeFile(
            file.path,
            "",
            "pinned",
            frozenset({file.sha256 or file.git_sha1 or ""}),
            file.size,
            f"{model.repo}/resolve/{model.revision}/{file.path}",
            "sha256" if file.sha256 else "git_sha1",
        )
        for model in models
        for file in model.files
        if file.locked and file.size is not None
    ]
    ordered = sorted(pinned, key=lambda each: each.size or 0)
    return list(dict.fromkeys([*ordered[-1:], *ordered[:1]]))


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

    kept = _read(folder)
    tables: dict[str, Mapping[str, object]] = {}
    for kind, fresh, old in (("pip", pip, kept.pip), ("conda", conda, kept.conda)):
        for name in sorted({*fresh, *old}):
            rows = fresh.get(name) or [row.model_dump() for row in old.get(name, [])]
            tables |= {f"{kind}.{name} {number}": row for number, row in enumerate(rows)}
    lines = [_HEADER.rstrip()]
    for title, row in tables.items():
        lines.append(f"\n[[{title.rpartition(' ')[0]}]]")
        lines += [f"{key} = {row[key] if key == 'size' else _quoted(row[key])}" for key in _Row.model_fields]
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


def _read(folder: Path) -> _Rows:
    path = folder / _FILE
    return toml.load(path, _Rows) if path.exists() else _Rows()
