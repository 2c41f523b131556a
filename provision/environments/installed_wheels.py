"""Verifies installed wheels against their RECORD."""

from __future__ import annotations

import csv
import os
from base64 import urlsafe_b64decode
from typing import TYPE_CHECKING

from provision.core.hashing import mismatched_files
from provision.core.progress import no_progress
from provision.lockfiles.requirements import LockedPackage, normal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.core.progress import Progress

ABSENT = "is not installed"


def harmed_packages(
    site: Path, wanted: Sequence[LockedPackage], *, deep: bool, progress: Progress = no_progress
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
    for whole in mismatched_files(digests, progress):
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
