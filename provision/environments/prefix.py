"""An environment's folder: its interpreter, its conda packages' files, and the path that its scripts carry."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core import process
from provision.core.errors import BlockedError
from provision.core.hashing import mismatched_files
from provision.core.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from provision.core.progress import Progress
    from provision.lockfiles.conda_lock import CondaPackage

_VERSION = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
_SHEBANG_LIMIT = 127  # Linux before 5.1 cuts the line there (BINPRM_BUF_SIZE)


def python_version(python: Path) -> str | None:
    """What an interpreter says of itself (such as "3.11.7"), or None when it does not run."""
    try:
        return process.run([python, "-I", "-S", "-c", _VERSION], timeout_seconds=20).stdout.strip() or None
    except process.CommandError:
        return None


def find_python(supported: Sequence[str], first: Path, advice: str) -> tuple[Path, str]:
    """An interpreter of this machine that the locks hold wheels for, the first supported version preferred.

    Args:
        supported: such as "3.11", the best first.
        first: an interpreter that is looked at before those on the PATH.
        advice: how to get one.

    Raises:
        BlockedError: there is none.
    """
    seen = []
    for minor in supported:
        for name in (str(first), f"python{minor}", "python3"):
            found = shutil.which(name)
            version = python_version(Path(found)) if found else None
            if found and version and version.rpartition(".")[0] == minor:
                real = process.run([found, "-I", "-c", "import os, sys; print(os.path.realpath(sys._base_executable))"])
                return Path(real.stdout.strip()), version
            if version:
                seen.append(version)
    have = ", ".join(sorted(set(seen))) or "none"
    raise BlockedError(
        f"no python of version {', '.join(supported)} is here (found: {have}), and the environment's packages are "
        f"locked for these. Install one (such as: {advice}), then run again."
    )


def too_long_for_scripts(prefix: Path) -> str | None:
    """Why scripts in this folder would not start, or None."""
    line = f"#!{prefix}/bin/python3.11"
    if len(line) <= _SHEBANG_LIMIT:
        return None
    return (
        f"{prefix} is so long that the first line of its scripts passes {_SHEBANG_LIMIT} characters, and they may not "
        f"start; take a root of at most {_SHEBANG_LIMIT - len(line) + len(str(prefix.parent.parent))} characters"
    )


def size_bytes(prefix: Path, without: Collection[str] = ()) -> int:
    """The bytes of every file below a folder, a hard-linked one counted once.

    Args:
        prefix: the folder.
        without: the folders right inside it that are not counted.
    """
    seen, total = set(), 0
    for base, folders, files in os.walk(prefix):
        if base == str(prefix):
            folders[:] = [name for name in folders if name not in without]
        for name in files:
            try:
                stat = os.lstat(f"{base}{os.sep}{name}")
            except OSError:
                continue  # it went while we looked
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_size
    return total


def conda_records(prefix: Path) -> dict[str, dict[str, Any]]:
    """{name: record} of the conda packages that an environment says it holds."""
    records = {}
    for file in sorted((prefix / "conda-meta").glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("name"), str):
            records[record["name"]] = record
    return records


def harmed_conda_packages(
    prefix: Path, wanted: Sequence[CondaPackage], *, deep: bool, progress: Progress = no_progress
) -> dict[str, str]:
    """{name: reason} of the locked conda packages that are absent, another build, or not as recorded.

    Args:
        prefix: an environment made from conda packages.
        wanted: what the lock pins.
        deep: hash every file, not only look for it.
        progress: told the files that are hashed.
    """
    records = conda_records(prefix)
    harmed, intact = {}, []
    for package in wanted:
        record = records.get(package.name)
        if record is None:
            harmed[package.name] = "is not installed"
        elif record.get("sha256") != package.sha256:
            found, build = record.get("version"), record.get("build")
            harmed[package.name] = f"is {found} ({build}), the lock wants {package.url.rpartition('/')[2]}"
        else:
            intact.append((package.name, record))
    hashed, digests = {}, []
    for name, record in intact:
        reason = _stat_files(prefix, record)
        if reason:
            harmed[name] = reason
        elif deep:
            for path, digest in _digests(record):
                hashed[f"{prefix}{os.sep}{path}"] = (name, path)
                digests.append((f"{prefix}{os.sep}{path}", bytes.fromhex(digest)))
    for whole in mismatched_files(digests, progress, "conda files"):
        name, path = hashed[whole]
        harmed.setdefault(name, f"{path} does not have its recorded content")
    return harmed


def _stat_files(prefix: Path, record: dict[str, Any]) -> str | None:
    """The first recorded file that is missing or has another size."""
    content = {row["_path"] for row in _content(record)}
    for row in record.get("paths_data", {}).get("paths", []):
        try:
            size = os.lstat(f"{prefix}{os.sep}{row['_path']}").st_size
        except OSError:
            return f"{row['_path']} is missing"
        if row["_path"] in content and "prefix_placeholder" not in row and row.get("size_in_bytes", size) != size:
            return f"{row['_path']} is {size} bytes, recorded with {row['size_in_bytes']}"
    return None


def _content(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The recorded files that have a content of their own: no links, no compiled bytecode."""
    kinds = {"hardlink", "unix_python_entry_point"}
    rows = record.get("paths_data", {}).get("paths", [])
    return [row for row in rows if row.get("path_type") in kinds and not row["_path"].endswith(".pyc")]


def _digests(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(path, sha256 in hex) of every file, as it is with the prefix written into it."""
    found = []
    for row in _content(record):
        digest = row.get("sha256_in_prefix") or (None if "prefix_placeholder" in row else row.get("sha256"))
        if digest:
            found.append((row["_path"], digest))
    return found
