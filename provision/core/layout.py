"""Defines the paths of the root, of caches in the home, and of the checkout's data."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from provision.core.client_folders import client_folders
from provision.core.errors import BlockedError

# The `envs/` of an installed package, and that of a checkout. The wheel carries a copy inside `provision/`.
_PACKAGED_ENVS = Path(__file__).resolve().parent.parent / "envs"
_CHECKOUT_ENVS = _PACKAGED_ENVS.parent.parent / "envs"


@dataclass(frozen=True)
class Root:
    """Name the files and folders inside firstlight's root on the volume.

    `has_own_hub`: this home keeps a hub cache of its own, so it does not use the one that another home has on the root.
    """

    path: Path
    has_own_hub: bool = field(default=False, compare=False)

    @property
    def state(self) -> Path:
        """Return the folder of firstlight's own records."""
        return self.path / ".firstlight"

    @property
    def marker(self) -> Path:
        """Return the marker: the file that proves that the volume is mounted."""
        return self.state / "volume.json"

    @property
    def capabilities(self) -> Path:
        """Return the record of the features of the root's file system, with one entry for each host and user."""
        return self.state / "capabilities.json"

    @property
    def lock(self) -> Path:
        """Return the file of the run lock, which the one writing run holds."""
        return self.state / "lock"

    @property
    def holder(self) -> Path:
        """Return the file in which an older version describes the run that holds the lock."""
        return self.state / "holder.json"

    @property
    def journal(self) -> Path:
        """Return the folder of the journal, with one append-only file for each run."""
        return self.state / "journal"

    @property
    def links(self) -> Path:
        """Return the record of the links that every host of this volume should have."""
        return self.state / "links.json"

    @property
    def relink(self) -> Path:
        """Return the script that makes the recorded links again."""
        return self.state / "relink.sh"

    @property
    def variables(self) -> Path:
        """Return the shell file of the variables that replace a link where a link cannot be made."""
        return self.state / "variables.sh"

    @property
    def stand_ins(self) -> Path:
        """Return the record of the stand-ins of this host, with the reason for each."""
        return self.state / "stand-ins.json"

    @property
    def model_pins(self) -> Path:
        """Return the record of the hashes that hubs listed for files without a pin in the manifest."""
        return self.state / "model-pins.json"

    @property
    def smoke(self) -> Path:
        """Return the record of the last smoke test: the environment and the measurements."""
        return self.state / "smoke.json"

    @property
    def validations(self) -> Path:
        """Return the folder of the results of `bench validate`, with one file for each run."""
        return self.state / "validations"

    @property
    def cache(self) -> Path:
        """Return the folder of the relocated caches, with one folder for each tool."""
        return self.path / "cache"

    @property
    def hub(self) -> Path:
        """Return the Hugging Face hub cache on the volume."""
        return self.cache / "huggingface" / "hub"

    @property
    def hub_in_use(self) -> Path:
        """Return the hub cache that a program of this process uses, by huggingface_hub's own rule.

        The volume's hub cache takes the place of the home's default one, to which a lost link should lead. If a link
        of the user leads to another folder, that one is in use.
        """
        folders = client_folders(os.environ, Path.home())
        is_default = folders.variable is None and not self.has_own_hub and not _is_linked(folders.hub)
        is_volume_hub = self.hub.exists() and (is_default or is_same_place(folders.hub, self.hub))
        return self.hub if is_volume_hub else folders.hub

    @property
    def pkgs(self) -> Path:
        """Return the cache of conda packages.

        It lies on the file system of the environments, so that its files can be hard-linked into them.
        """
        return self.path / "pkgs"

    def prefix(self, env: str) -> Path:
        """Return the prefix of an environment."""
        return self.path / "envs" / env


def interpreter(prefix: Path) -> Path:
    """Return the path of an environment's python.

    On Windows a venv has it in `Scripts`, and a conda environment in the prefix itself.
    """
    candidates = (prefix / "Scripts" / "python.exe", prefix / "python.exe")
    return next((python for python in candidates if python.exists()), prefix / "bin" / "python")


def is_same_place(path: Path, other: Path) -> bool:
    """Return whether two paths lead to one existing file or folder."""
    try:
        return path.samefile(other)
    except OSError:
        return False


def _is_linked(hub: Path) -> bool:
    """Return whether the default hub cache, or a folder above it up to ~/.cache, is a link to an existing folder."""
    return any(path.is_symlink() and path.exists() for path in (hub, *hub.parents[:2]))


def linked_root(link: Path) -> Root | None:
    """Return the root to which an earlier setup relocated a cache, or None; `link` is the link left in the home.

    The dangling link of a hub cache counts too: its volume may not be mounted now, and another root must not replace
    it.
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
    """Return the root in the user's data folder, used when no other root is named or found."""
    import platformdirs

    return platformdirs.user_data_path("firstlight", appauthor=False)


def program(name: str = "provision") -> str:
    """Return the command that starts a program of firstlight: its name if PATH contains it, else its path."""
    import shutil

    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def tool_folder(name: str) -> Path:
    """Return the folder in which a program is installed that cannot be part of the toolbox."""
    import platformdirs

    return platformdirs.user_cache_path("firstlight", appauthor=False) / name


def is_packaged() -> bool:
    """Return whether this code runs from an installed wheel, where there is no Makefile and no `envs/` to edit."""
    return _PACKAGED_ENVS.is_dir()


def shipped_envs() -> Path:
    """Return the `envs/` that this code ships with: the copy inside an installed package, else the checkout's."""
    return _PACKAGED_ENVS if is_packaged() else _CHECKOUT_ENVS


def envs_folder(named: Path | None) -> Path:
    """Return the absolute `envs/` folder of a command.

    The order is: the folder that --envs names; for an installed package, `./envs` of the current folder if it has a
    torch.toml; the shipped one. A root also has a folder `envs`, with the environments themselves and no torch.toml.
    """
    if named is not None:
        return named.absolute()
    own = Path("envs").absolute()
    return own if is_packaged() and (own / "torch.toml").is_file() else shipped_envs()


def require_own(envs: Path) -> None:
    """Refuse to write into the `envs/` of an installed package.

    Raises:
        BlockedError: `envs` is that folder; the message gives the command that copies it.
    """
    if is_packaged() and envs.resolve() == _PACKAGED_ENVS:
        copy = shlex.join(["cp", "-r", str(envs), "envs"])
        raise BlockedError(
            f"{envs} belongs to the installed package, and an upgrade replaces it. Make a copy in the current folder, "
            f"which the next commands there use: `{copy}`. Then run this command again.",
            next_act=copy,
        )


def next_command(target: str) -> str:
    """Return the command that a message tells a person to run: make's in a checkout, else our own program's.

    Args:
        target: a target of the Makefile, such as "setup"; "bench" stands for `bench run`.
    """
    if not is_packaged():
        return f"make {target}"
    return f"{program('bench')} run" if target == "bench" else f"{program()} {target}"
