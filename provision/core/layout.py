"""Where things lie: the layout of the root, the home, and the checkout's data."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Root:
    """The persistent folder and the places inside it."""

    path: Path

    @property
    def state(self) -> Path:
        """Our own bookkeeping."""
        return self.path / ".firstlight"

    @property
    def marker(self) -> Path:
        """The file that tells this volume from an empty mount point."""
        return self.state / "volume.json"

    @property
    def lock(self) -> Path:
        """Held by the one run that writes here."""
        return self.state / "lock"

    @property
    def holder(self) -> Path:
        """Which run that is, for those who come second."""
        return self.state / "holder.json"

    @property
    def journal(self) -> Path:
        """One append-only file a run."""
        return self.state / "journal"

    @property
    def links(self) -> Path:
        """The links that the hosts of this volume should have."""
        return self.state / "links.json"

    @property
    def relink(self) -> Path:
        """The script that restores them."""
        return self.state / "relink.sh"

    @property
    def variables(self) -> Path:
        """The variables that do what a link cannot, as a shell reads them."""
        return self.state / "variables.sh"

    @property
    def stand_ins(self) -> Path:
        """The models for which this host took random weights, and why."""
        return self.state / "stand-ins.json"

    @property
    def model_pins(self) -> Path:
        """What hubs said of files whose hashes the manifest does not name."""
        return self.state / "model-pins.json"

    @property
    def smoke(self) -> Path:
        """What the last smoke run measured, and of which environment."""
        return self.state / "smoke.json"

    @property
    def validations(self) -> Path:
        """What `bench validate` has found on the hosts of this volume, a file a time."""
        return self.state / "validations"

    @property
    def cache(self) -> Path:
        """The relocated caches, a folder a tool."""
        return self.path / "cache"

    @property
    def hub(self) -> Path:
        """The Hugging Face hub cache."""
        return self.cache / "huggingface" / "hub"

    @property
    def hub_in_use(self) -> Path:
        """The hub cache that programs of this home use: the volume's, or the home's own where it is not relocated."""
        return self.hub if self.hub.exists() else hub_cache(os.environ, Path.home())

    @property
    def pkgs(self) -> Path:
        """The conda packages' cache; on one file system with the environments, so that its files are linked."""
        return self.path / "pkgs"

    def prefix(self, env: str) -> Path:
        """The folder of one environment."""
        return self.path / "envs" / env


def interpreter(prefix: Path) -> Path:
    """The python of an environment; on Windows a venv has it in Scripts, conda in the prefix itself."""
    known = (prefix / "Scripts" / "python.exe", prefix / "python.exe")
    return next((python for python in known if python.exists()), prefix / "bin" / "python")


def hub_cache(environ: Mapping[str, str], home: Path) -> Path:
    """Where the Hugging Face client keeps its hub cache on this host.

    Source: huggingface_hub's documented order HF_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub.
    """
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache").expanduser()
    return cache / "huggingface" / "hub"


def linked_root(link: Path) -> Root | None:
    """The root onto which an earlier setup moved a cache, by the link that it left in the home.

    A hub cache's link that leads nowhere counts as well: its volume may not be mounted, and no other may take its
    place.
    """
    try:
        target = link.readlink()
    except OSError:
        return None
    for root in map(Root, target.parents if target.is_absolute() else ()):
        if target.is_relative_to(root.cache) and root.marker.is_file():
            return root
        if target == root.hub and not target.exists():
            return root
    return None


def default_root() -> Path:
    """The user's data folder: taken when no root is named, and no earlier one is linked."""
    import platformdirs

    return platformdirs.user_data_path("firstlight", appauthor=False)


def program(name: str = "provision") -> str:
    """Return the command that starts one of our programs: its name where the PATH has it, else its path."""
    import shutil

    if shutil.which(name):
        return name
    place = Path(sys.executable).parent / name
    return str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)


def tool_folder(name: str) -> Path:
    """Where a program that cannot live in the toolbox is installed."""
    import platformdirs

    return platformdirs.user_cache_path("firstlight", appauthor=False) / name


def shipped_envs() -> Path:
    """The checkout's `envs/`, or the copy inside an installed distribution."""
    beside = Path(__file__).resolve().parent.parent.parent / "envs"
    return beside if beside.is_dir() else Path(__file__).resolve().parent.parent / "envs"
