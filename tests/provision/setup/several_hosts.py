"""Runs commands on one volume as several hosts, whose names this process takes in turn."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.layout import Root
from tests.provision.run_command import provision

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    import pytest


@dataclass
class Hosts:
    """Runs commands on one volume as several hosts, each with its own home."""

    base: Path
    volume: Path
    envs: Path
    patch: pytest.MonkeyPatch

    @property
    def root(self) -> Root:
        return Root(self.volume)

    def home(self, name: str) -> Path:
        folder = self.base / f"home of {name}"
        folder.mkdir(exist_ok=True)
        return folder

    def run(self, name: str, *words: object, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `provision` with this host name and, unless `home` is given, with that host's home."""
        flags = ["--root", self.volume, "--host", self.base / "host.toml"]
        flags += ["--envs", self.envs] if words[0] != "undo" else []
        self.patch.setattr(platform, "node", lambda: name)
        return provision(*words, *flags, env={"HOME": str(home or self.home(name))})

    def good(self, name: str, *words: object, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        completed = self.run(name, *words, home=home)
        assert completed.returncode == 0, completed.stdout + completed.stderr
        return completed

    def relocated(self, name: str, folder: str, content: str, to: str) -> Path:
        """Make a folder with one file in the home of a host, relocate the folder, and return its path in the home."""
        path = self.home(name) / folder
        path.mkdir()
        (path / f"of {name}").write_text(content)
        self.good(name, "relocate", path, "--to", to)
        return path

    def runs(self) -> list[dict[str, str]]:
        listed: list[dict[str, str]] = json.loads(self.good("any", "undo", "--list", "--json").stdout)["runs"]
        return listed
