"""Inspects the prefix, the folder of an environment: its interpreter, its size and the files of conda packages."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core import process
from provision.core.errors import BlockedError
from provision.core.hashing import mismatched_files
from provision.core.progress import no_progress
from provision.fs import records as record_file

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from provision.core.progress import Progress
    from provision.lockfiles.conda_lock import CondaPackage

_VERSION = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
_SHEBANG_LIMIT = 127  # Linux before 5.1 cuts a longer first line of a script (BINPRM_BUF_SIZE)


def python_version(python: Path) -> str | None:
    """Return the version of a Python interpreter, such as "3.11.7"; None if the interpreter does not run."""
    try:
        return process.run([python, "-I", "-S", "-c", _VERSION], timeout_seconds=20).stdout.strip() or None
    except process.CommandError:
        return None


def find_python(supported: Sequence[str], first: Path, advice: str) -> tuple[Path, str]:
    """Return the path and the full version of a Python interpreter on this host with a supported version.

    For a venv it is the interpreter from which the venv was made.

    Args:
        supported: the supported versions, such as "3.11", the best first.
        first: the path of the interpreter that is tried before those on the PATH.
        advice: the command that installs a supported Python, for the message of the error.

    Raises:
        BlockedError: no interpreter has a supported version.
    """
    other_versions = []
    for minor in supported:
        for name in (str(first), f"python{minor}", "python3"):
            path = shutil.which(name)
            version = python_version(Path(path)) if path else None
            if path and version and version.rpartition(".")[0] == minor:
                base = process.run([path, "-I", "-c", "import os, sys; print(os.path.realpath(sys._base_executable))"])
                return Path(base.stdout.strip()), version
            if version:
                other_versions.append(version)
    available = ", ".join(sorted(set(other_versions))) or "none"
    raise BlockedError(
        f"this machine has no Python {' or '.join(supported)} (it has: {available}), and the locks have wheels for "
        f"these versions only. Install one of them, for example with `{advice}`, then run again."
    )


def too_long_for_scripts(prefix: Path) -> str | None:
    """Return a warning if the path of a prefix is too long for the first line of scripts; else None.

    The first line has the path of the interpreter. A script with a line of more than 127 characters may fail to start.
    """
    line = f"#!{prefix}/bin/python3.11"
    if len(line) <= _SHEBANG_LIMIT:
        return None
    return (
        f"with the path {prefix}, the first line of scripts has more than {_SHEBANG_LIMIT} characters, so the scripts "
        "may fail to start; choose a root whose path has at most "
        f"{_SHEBANG_LIMIT - len(line) + len(str(prefix.parent.parent))} characters"
    )


def size_bytes(prefix: Path, without: Collection[str] = ()) -> int:
    """Return the size in bytes of all files below a folder; a file with several hard links counts once.

    Args:
        prefix: the folder.
        without: the names of subfolders directly in the folder that are not counted.
    """
    seen, total = set(), 0
    for base, folders, files in os.walk(prefix):
        if base == str(prefix):
            folders[:] = [name for name in folders if name not in without]
        for name in files:
            try:
                stat = os.lstat(f"{base}{os.sep}{name}")
            except OSError:
                continue  # the file was deleted after os.walk listed it
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_size
    return total


_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_DIGESTS = ("sha256", "sha256_in_prefix")


def conda_records(prefix: Path) -> dict[str, dict[str, Any]]:
    """Return {name of a package: its record} from the JSON files in an environment's conda-meta folder.

    A damaged record is left out, so its package counts as missing.
    """
    records = {}
    for file in sorted((prefix / "conda-meta").glob("*.json")):
        try:
            record = record_file.table(record_file.read_json(file))
            _check_record(record)
        except (OSError, ValueError, KeyError):
            continue
        records[str(record["name"])] = record
    return records


def _check_record(record: dict[str, Any]) -> None:
    """Check the types of the values that are read from a record.

    Raises:
        ValueError, KeyError: a value is missing or has another type.
    """
    record_file.typed(record["name"], str)
    for spec in record_file.typed(record.get("depends", []), list):
        if not record_file.typed(spec, str).strip():
            raise ValueError("an empty dependency")
    for row in record_file.rows(record_file.table(record.get("paths_data", {})).get("paths", [])):
        record_file.typed(row["_path"], str)
        record_file.typed(row.get("path_type", ""), str)
        if any(_SHA256.fullmatch(str(row[key])) is None for key in _DIGESTS if row.get(key) is not None):
            raise ValueError("not a checksum")


def damaged_conda_packages(
    prefix: Path, packages: Sequence[CondaPackage], *, deep: bool, progress: Progress = no_progress
) -> dict[str, str]:
    """Return {name: reason} of the locked conda packages that are missing, another build, or have damaged files.

    The reason is the end of a sentence whose subject is the package, or a sentence about one of its files.

    Args:
        prefix: the folder of an environment with conda packages.
        packages: the packages in the conda lock file.
        deep: compare the hash of each file with the record of its package, not only the size.
        progress: called while files are hashed, as `core.progress.Progress` describes; it counts files or bytes.
    """
    records = conda_records(prefix)
    damaged, intact = {}, []
    for package in packages:
        record = records.get(package.name)
        if record is None:
            damaged[package.name] = "is not installed"
        elif record.get("sha256") != package.sha256:
            version, build = record.get("version"), record.get("build")
            damaged[package.name] = f"is {version} ({build}), but the lock pins {package.url.rpartition('/')[2]}"
        else:
            intact.append((package.name, record))
    hashed, digests = {}, []
    for name, record in intact:
        reason = _size_fault(prefix, record)
        if reason:
            damaged[name] = reason
        elif deep:
            for path, digest in _digests(record):
                hashed[f"{prefix}{os.sep}{path}"] = (name, path)
                digests.append((f"{prefix}{os.sep}{path}", bytes.fromhex(digest)))
    for full_path in mismatched_files(digests, progress, "conda files"):
        name, path = hashed[full_path]
        damaged.setdefault(name, f"{path} does not have its recorded content")
    return damaged


def _size_fault(prefix: Path, record: dict[str, Any]) -> str | None:
    """Return a text about the first file in a conda record that is missing or has another size; None without one."""
    content = {row["_path"] for row in _content(record)}
    for row in record.get("paths_data", {}).get("paths", []):
        try:
            size = os.lstat(f"{prefix}{os.sep}{row['_path']}").st_size
        except OSError:
            return f"{row['_path']} is missing"
        if row["_path"] in content and "prefix_placeholder" not in row and row.get("size_in_bytes", size) != size:
            return f"{row['_path']} has {size} bytes, but its record in conda-meta lists {row['size_in_bytes']}"
    return None


def _content(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a package's record for files with content, without symbolic links and compiled bytecode."""
    kinds = {"hardlink", "unix_python_entry_point"}
    rows = record.get("paths_data", {}).get("paths", [])
    return [row for row in rows if row.get("path_type") in kinds and not row["_path"].endswith(".pyc")]


def _digests(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (path in the prefix, sha256 in hex) of each file in a package's record that has a hash.

    It is the hash of the installed file, in which the path of the prefix may have been written.
    """
    digests = []
    for row in _content(record):
        digest = row.get("sha256_in_prefix") or (None if "prefix_placeholder" in row else row.get("sha256"))
        if digest:
            digests.append((row["_path"], digest))
    return digests
