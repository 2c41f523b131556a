"""Reads the marker file of an environment that firstlight made, and finds the environment's site-packages folders."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from provision.core.python_source import PythonSource

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MARKER_NAME = ".firstlight.json"


def read_owner(where: Path) -> dict[str, object] | None:
    """Return the content of the marker file `.firstlight.json` of an environment.

    The result is None if the file is missing or damaged, as in an environment that firstlight did not make. `where` is
    the prefix.
    """
    try:
        owner = json.loads((where / MARKER_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


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
