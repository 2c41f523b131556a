"""Provides flags for tests of `provision env`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root_flags(tmp_path: Path) -> list[object]:
    """Return the flags --root and --host of a host without models and relocations; --envs is not among them."""
    (tmp_path / "host.toml").write_text("relocate = []\nmodels = []\n")
    return ["--root", tmp_path / "root", "--host", tmp_path / "host.toml"]
