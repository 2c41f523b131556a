"""Defines the paths inside the root, the caches in the home folder, and the paths of the checkout's data."""

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

    `has_own_hub` is True if this home keeps its hub cache outside of the root. The hub cache that another home has put
    on the root is then not used.
    """

    path: Path
    has_own_hub: bool = field(default=False, compare=False)

    @property
    def state(self) -> Path:
        """Return the folder of firstlight's own records, `.firstlight` in the root."""
        return self.path / ".firstlight"

    @property
    def marker(self) -> Path:
        """Return the marker: the file that proves that the volume is mounted."""
        return self.state / "volume.json"

    @property
    def capabilities(self) -> Path:
        """Return the file that records the features of the root's file system, one entry for each host and user."""
        return self.state / "capabilities.json"

    @property
    def lock(self) -> Path:
        """Return the file of the run lock; the run that changes the root holds this lock."""
        return self.state / "lock"

    @property
    def holder(self) -> Path:
        """Return the file in which an older version of firstlight describes the run that holds the run lock."""
        return self.state / "holder.json"

    @property
    def journal(self) -> Path:
        """Return the folder of the journal, with one append-only file for each run."""
        return self.state / "journal"

    @property
    def links(self) -> Path:
        """Return the file that records the symbolic links into the volume, with the owner of each link."""
        return self.state / "links.json"

    @property
    def relink(self) -> Path:
        """Return the script that makes the recorded links again."""
        return self.state / "relink.sh"

    @property
    def variables(self) -> Path:
        """Return the folder of the variables for tools whose folders cannot become links, with files for each home."""
        return self.state / "variables"

    @property
    def old_variables(self) -> Path:
        """Return the record of variables that an older version has written for all homes."""
        return self.state / "variables.json"

    @property
    def stand_ins(self) -> Path:
        """Return the file that records the stand-ins of this host, with the reason for each."""
        return self.state / "stand-ins.json"

    @property
    def model_pins(self) -> Path:
        """Return the file that records the hashes that hubs listed for files without a pin in the manifest."""
        return self.state / "model-pins.json"

    @property
    def smoke(self) -> Path:
        """Return the file that records the last smoke test: the environment and the measurements."""
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
        """Return the hub cache that a program with the environment variables of this process uses.

        If a variable selects a folder, a link of the user leads to one, or `has_own_hub` is True, the result is the
        folder that huggingface_hub computes itself. Otherwise the result is the hub cache on the volume, if it exists:
        the default cache of the home should be a link to it, even if a wipe has deleted this link.
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
        """Return the prefix of an environment: `envs/NAME` in the root."""
        return self.path / "envs" / env


def interpreter(prefix: Path) -> Path:
    """Return the path of an environment's python executable.

    On Windows it lies in `Scripts` in a venv, and in the prefix itself in a conda environment.
    """
    candidates = (prefix / "Scripts" / "python.exe", prefix / "python.exe")
    return next((python for python in candidates if python.exists()), prefix / "bin" / "python")


def is_same_place(path: Path, other: Path) -> bool:
    """Return whether two paths lead to the same existing file or folder."""
    try:
        return path.samefile(other)
    except OSError:
        return False


def _is_linked(hub: Path) -> bool:
    """Return whether the default hub cache, or a folder above it up to ~/.cache, is a link to an existing folder."""
    return any(path.is_symlink() and path.exists() for path in (hub, *hub.parents[:2]))


def linked_root(link: Path) -> Root | None:
    """Return the root to which the link `link` in a home leads, or None.

    An earlier setup has made such a link when it relocated a cache to the root. A dangling link to a hub cache counts
    too: its volume may not be mounted now, and another root must not take its place.
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


def root_by_hand(path: Path, home: Path) -> Root | None:
    """Return the root to which a link leads that the user has made from a cache, or from a folder above it, or None.

    The link counts only if it leads below a folder with a marker.
    """
    if not any(step.is_symlink() for step in (path, *path.parents) if step != home and step.is_relative_to(home)):
        return None
    real = Path(os.path.realpath(path))
    return next((root for root in map(Root, real.parents) if root.marker.is_file()), None)


def default_root() -> Path:
    """Return the root in the user's data folder, which is used if no flag, file, link or profile gives another."""
    import platformdirs

    return platformdirs.user_data_path("firstlight", appauthor=False)


def program(name: str = "provision") -> str:
    """Return the command that starts "provision" or "bench": the name if PATH contains the program, else the path."""
    import shutil

    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def tool_folder(name: str) -> Path:
    """Return the folder in the user's cache for a program that firstlight installs outside of its own `.venv`."""
    import platformdirs

    return platformdirs.user_cache_path("firstlight", appauthor=False) / name


def is_packaged() -> bool:
    """Return whether this code runs from an installed wheel, which has no Makefile and no editable `envs/`."""
    return _PACKAGED_ENVS.is_dir()


def shipped_envs() -> Path:
    """Return the `envs/` folder that belongs to this code: inside the installed package, else in the checkout."""
    return _PACKAGED_ENVS if is_packaged() else _CHECKOUT_ENVS


def envs_folder(named: Path | None) -> Path:
    """Return the absolute path of the `envs/` folder that a command reads.

    The order is: the folder `named`, which is the value of --envs; `./envs` of the current folder, if this code is an
    installed package and `./envs` has a torch.toml; the folder that belongs to this code. The torch.toml is required
    because a root also has a folder `envs`, with the environments themselves and without a torch.toml.
    """
    if named is not None:
        return named.absolute()
    own = Path("envs").absolute()
    return own if is_packaged() and (own / "torch.toml").is_file() else shipped_envs()


def require_own(envs: Path) -> None:
    """Check that an `envs/` folder is the user's own, before a command writes into it.

    Raises:
        BlockedError: `envs` lies in the installed package; the message gives the command that copies the folder.
    """
    if is_packaged() and envs.resolve() == _PACKAGED_ENVS:
        copy = shlex.join(["cp", "-r", str(envs), "envs"])
        raise BlockedError(
            f"{envs} belongs to the installed package, and an upgrade replaces it. Make a copy in the current folder, "
            f"which the next commands there use: `{copy}`. Then run this command again.",
            next_act=copy,
        )


def next_command(target: str) -> str:
    """Return a command for the user, as text in a message: `make TARGET` in a checkout, else a program of firstlight.

    Args:
        target: a target of the Makefile, such as "setup"; "bench" stands for `bench run`.
    """
    if not is_packaged():
        return f"make {target}"
    return f"{program('bench')} run" if target == "bench" else f"{program()} {target}"
