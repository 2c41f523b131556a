"""Provides the fixtures of the tests of setup and undo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.provision.setup.several_hosts import Hosts

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def hosts(tmp_path: Path, envs: Path, volume: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    """Return hosts that share a volume, with a host.toml that relocates pip's cache."""
    (tmp_path / "host.toml").write_text('models = []\nrelocate = ["pip"]\n')
    return Hosts(tmp_path, volume, envs, monkeypatch)
