"""How an environment is entered: the variables of an activated one, and the link by which conda finds ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.step import Check, State
from provision.fs.open_dir import OpenDir, link_target
from provision.installers import conda_settings
from provision.volume import links
from provision.volume.changes import make_folders
from provision.volume.environment_marker import python_source, read_owner
from provision.volume.journal_acts import EnvironmentLink

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from provision.core.layout import Root
    from provision.volume.journal import Journal

BASES = ("miniconda3", "anaconda3", "miniforge3", "mambaforge", "micromamba")


def activated(prefix: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a program that runs in an environment, as its own activation sets them."""
    env = dict(environ)
    for name in ("PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV"):
        env.pop(name, None)
    env["PATH"] = os.pathsep.join(filter(None, [str(prefix / "bin"), env.get("PATH", "")]))
    if (prefix / "conda-meta").is_dir():
        env |= {"CONDA_PREFIX": str(prefix), "CONDA_DEFAULT_ENV": prefix.name}
    else:
        env["VIRTUAL_ENV"] = str(prefix)
    return env


def conda_bases(environ: Mapping[str, str], home: Path) -> list[Path]:
    """The conda installations of this machine, the one in use first."""
    named = [environ.get("CONDA_EXE"), shutil.which("conda", path=environ.get("PATH", ""))]
    found = [Path(os.path.realpath(exe)).parent.parent for exe in named if exe]
    found += [parent / base for parent in (home, Path("/root"), Path("/opt")) for base in BASES]
    found += [Path("/opt/conda")]
    whole = []
    for base in found:
        try:
            if (base / "conda-meta").is_dir() and base not in whole:
                whole.append(base)
        except OSError:
            continue  # another user's home
    return whole


def conda_folders(environ: Mapping[str, str], home: Path) -> list[Path]:
    """The folders of this home that the user has named to conda for environments and packages.

    Raises:
        SpecError: conda's settings cannot be read.
    """
    settings = conda_settings.conda_settings(environ, home)
    named = [environ.get(name) or "" for name in ("CONDA_ENVS_DIRS", "CONDA_ENVS_PATH", "CONDA_PKGS_DIRS")]
    found = [folder for each in named for folder in each.split(os.pathsep)]
    for key in ("envs_dirs", "envs_path", "pkgs_dirs"):
        listed = settings.get(key)
        found += listed if isinstance(listed, list) else [listed] if listed else []
    folders = [home / str(folder).removeprefix("~/") for folder in found if folder]
    return [folder for folder in folders if folder != home and folder.is_relative_to(home)]


class CondaLinkStep:
    """Conda finds the environment by its name: `conda activate NAME` and `conda env list`."""

    essential = False
    local = True

    def __init__(self, prefix: Path, home: Path, bases: list[Path], journal: Journal) -> None:
        """Take the environment's folder, the home, and the conda installations that are here."""
        self.name = f"conda sees {prefix.name}"
        self.prefix = prefix
        self.bases = bases
        self.journal = journal
        self.home = home
        # One of conda's own default envs_dirs, so no setting of the user's is touched.
        self.link = home / ".conda" / "envs" / prefix.name

    def is_recorded(self, root: Root) -> bool:
        """Whether an earlier run has made the link: then it is kept, also while no conda is here."""
        return any(link.path == self.link for link in links.recorded(root, self.home))

    def linked(self) -> Iterator[links.Link]:
        """The link, where it stands."""
        if link_target(self.link) == str(self.prefix):
            yield links.Link(self.link, self.prefix)

    def describe(self) -> str:
        """The plan's line."""
        return f"link {self.link} to {self.prefix}, so that `conda activate {self.prefix.name}` finds it"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no depth)
        """Look at the link, and for an environment of conda's own that has the name."""
        owner = read_owner(self.prefix)
        if owner is None or not python_source(owner).is_conda:
            return Check(State.OK, f"it is no conda environment; enter it with: . {self.prefix}/bin/activate")
        taken = next((base for base in self.bases if (base / "envs" / self.prefix.name).exists()), None)
        ours = self.link.is_symlink() and self.link.readlink() == self.prefix
        # A link that leads nowhere is somebody's too: what it leads to may only not be mounted.
        if taken is not None or (not ours and (self.link.is_symlink() or self.link.exists())):
            where = taken / "envs" / self.prefix.name if taken else self.link
            note = f"conda has {where} under this name; enter ours with: conda activate {self.prefix}"
            return Check(State.OK, note, note)
        if ours:
            return Check(State.OK, f"conda activate {self.prefix.name}")
        return Check(State.DRIFTED, f"{self.link} is not there")

    def apply(self) -> None:
        """Make the link."""
        make_folders(self.link.parent, self.journal)
        self.journal.record(EnvironmentLink(self.link, self.prefix))
        with OpenDir.at(self.link.parent) as parent:
            parent.symlink(self.link.name, str(self.prefix))
