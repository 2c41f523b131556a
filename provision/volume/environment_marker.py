"""Reads the marker that firstlight writes into an environment that it made, and finds its packages."""

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
    """What firstlight wrote into an environment that it made, or None."""
    try:
        owner = json.loads((where / MARKER_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def python_source(owner: Mapping[str, object]) -> PythonSource:
    """Return the source of the python of an environment that `read_owner` describes."""
    return PythonSource.CONDA if owner.get("interpreter") == "conda" else PythonSource.SYSTEM


def site_packages(prefix: Path, version: str) -> Path:
    """The environment's site-packages, for a Python version such as "3.11.7"."""
    if sys.platform == "win32":
        return prefix / "Lib" / "site-packages"
    return prefix / "lib" / f"python{version.rpartition('.')[0]}" / "site-packages"


def site_folders(prefix: Path) -> list[Path]:
    """Return every site-packages folder of an environment that is there; of two names of one folder, the real one."""
    found = [*prefix.glob("lib/python3*/site-packages"), *prefix.glob("Lib/site-packages")]
    return sorted({folder.resolve() for folder in found if folder.is_dir()})
