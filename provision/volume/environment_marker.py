"""Reads the marker file of an environment that firstlight made, and finds the environment's site-packages folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.python_source import PythonSource
from provision.fs import records

if TYPE_CHECKING:
    from collections.abc import Mapping

MARKER_NAME = ".firstlight.json"
_TEXTS = ("env", "variant", "interpreter", "prefix", "passed", "reason")


def read_owner(where: Path) -> dict[str, object] | None:
    """Return the content of the marker file `.firstlight.json` of an environment.

    The result is None if the file is missing or damaged, as in an environment that firstlight did not make. `where` is
    the prefix.
    """
    try:
        owner = records.table(records.read_json(where / MARKER_NAME))
    except (OSError, ValueError):
        return None
    is_whole = all(isinstance(owner.get(key), str | None) for key in _TEXTS)
    # Scripts get a new path in place of the recorded prefix, so another text must not take its place.
    return owner if is_whole and Path(str(owner.get("prefix") or "/")).is_absolute() else None


def python_source(owner: Mapping[str, object]) -> PythonSource:
    """Return the source of an environment's Python, from the content of its marker as `read_owner` returns it."""
    return PythonSource.CONDA if owner.get("interpreter") == "conda" else PythonSource.SYSTEM


def site_packages(prefix: Path, version: str) -> Path:
    """Return the path of the site-packages folder in an environment for a Python version such as "3.11.7"."""
    if sys.platform == "win32":
        return prefix / "Lib" / "site-packages"
    return prefix / "lib" / f"python{version.rpartition('.')[0]}" / "site-packages"


def site_folders(prefix: Path) -> list[Path]:
    """Return the existing site-packages folders of an environment, each once, with links resolved."""
    folders = [*prefix.glob("lib/python3*/site-packages"), *prefix.glob("Lib/site-packages")]
    return sorted({folder.resolve() for folder in folders if folder.is_dir()})
