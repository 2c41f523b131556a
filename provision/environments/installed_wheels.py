"""Compares installed pip packages with the lock file, and their files with RECORD, a wheel's list of its files."""

from __future__ import annotations

import csv
import os
import re
import stat
from base64 import urlsafe_b64decode
from typing import TYPE_CHECKING

from provision.core.hashing import mismatched_files
from provision.core.progress import no_progress
from provision.fs import records
from provision.lockfiles.requirements import LockedPackage, normal

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from provision.core.progress import Progress

# A RECORD may have any algorithm; a sha256 has 43 characters without padding (source: the specification of RECORD).
_DIGEST = re.compile(r"(sha256=[A-Za-z0-9_-]{43}=?|(?!sha256=)[a-z0-9_]+=[A-Za-z0-9_=-]+)?")
_SIZE = re.compile(r"([0-9]{1,18})?")
_DAMAGED = "RECORD is damaged"
ABSENT = "is not installed"


def damaged_packages(
    site: Path, packages: Sequence[LockedPackage], *, deep: bool, progress: Progress = no_progress
) -> dict[str, str]:
    """Return {name: reason} of the locked packages that are missing, have another version, or have damaged files.

    The reason is the end of a sentence whose subject is the package, or a sentence about one of its files.

    Args:
        site: the site-packages folder of an environment.
        packages: the packages in the lock file.
        deep: compare the hash of each file with RECORD, not only the size.
        progress: called while files are hashed, as `core.progress.Progress` describes; it counts files or bytes.
    """
    installed = {}
    for folder in site.glob("*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").partition("-")
        installed[normal(name)] = (version, folder)
    damaged = {}
    intact: list[tuple[str, Path]] = []
    for package in packages:
        if package.name not in installed:
            damaged[package.name] = ABSENT
        elif installed[package.name][0] != package.version:
            damaged[package.name] = f"is {installed[package.name][0]}, but the lock pins {package.version}"
        else:
            intact.append((package.name, installed[package.name][1]))
    hashed: dict[str, tuple[str, str]] = {}
    digests = []
    for name, info in intact:
        # One thread is faster for 20,000 calls of stat, since several threads would wait for Python's global lock.
        reason = _size_fault(info)
        if reason:
            damaged[name] = reason
        elif deep:
            for path, digest in _digests(info):
                full_path = f"{info.parent}{os.sep}{path}"
                hashed[full_path] = (name, path)
                digests.append((full_path, digest))
    for full_path in mismatched_files(digests, progress):
        name, path = hashed[full_path]
        damaged.setdefault(name, f"{path} does not have its recorded content")
    return damaged


def delete_damaged_records(site: Path, names: Collection[str]) -> None:
    """Delete the damaged RECORD files of packages.

    uv installs a package without a RECORD again, but stops at a damaged one.

    Args:
        site: a site-packages folder.
        names: normalized names of packages.
    """
    for info in site.glob("*.dist-info"):
        if normal(info.name.partition("-")[0]) in names and _size_fault(info) == f"{info.name}/{_DAMAGED}":
            (info / "RECORD").unlink()


def _digests(info: Path) -> list[tuple[str, bytes]]:
    """Return (path, sha256 digest) of each file that has a sha256 in the RECORD of a .dist-info folder."""
    rows = [(path, digest.partition("=")) for path, digest, _ in _record(info)]
    return [(path, urlsafe_b64decode(f"{digest}=")) for path, (kind, _, digest) in rows if kind == "sha256"]


def _size_fault(info: Path) -> str | None:
    """Return a text about the first file in RECORD that is missing or has another size; None without one."""
    site = f"{info.parent}{os.sep}"
    try:
        rows = _record(info)
    except FileNotFoundError:
        return f"{info.name}/RECORD is missing"
    except (OSError, ValueError, csv.Error):
        return f"{info.name}/{_DAMAGED}"
    for path, _, size in rows:
        try:
            status = os.stat(site + path)  # noqa: PTH116 (20,000 files in a tenth of a second)
        except OSError:
            return f"{path} is missing"
        if not stat.S_ISREG(status.st_mode):
            return f"{path} is not a file"
        if size and int(size) != status.st_size:
            return f"{path} has {status.st_size} bytes, but RECORD lists {size}"
    return None


def _record(info: Path) -> list[tuple[str, str, str]]:
    """Return (path, digest, size) of each file in RECORD, without compiled bytecode.

    The values are the text of the file: the digest is such as "sha256=…", and the digest and size may be "".

    Raises:
        ValueError, csv.Error: RECORD is damaged: it is empty, or a row is not a path, a checksum and a size.
        OSError: RECORD cannot be read.
    """
    text = records.read_bytes(info / "RECORD").decode("utf-8")
    lines = [line for line in map(_without_return, text.split("\n")) if line]
    # Nearly all lines have three fields without quotes, so split is sufficient. Only a path with a comma has quotes.
    rows = [line.split(",") for line in lines] if '"' not in text else list(csv.reader(lines, strict=True))
    if not rows or "\0" in text or any(len(row) != 3 for row in rows):
        raise ValueError("not the list of a package's files")
    files = [(path, digest, size) for path, digest, size in rows if not path.endswith(".pyc")]
    if not all(_SIZE.fullmatch(size) and _DIGEST.fullmatch(digest) for _, digest, size in files):
        raise ValueError("not a checksum and a size")
    return files


def _without_return(line: str) -> str:
    return line.removesuffix("\r")
