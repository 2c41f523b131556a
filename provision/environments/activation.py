"""Returns the variables of an activated environment, and links the root's environments into conda's folder."""

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
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from provision.core.layout import Root
    from provision.volume.journal import Journal

# The default folder names of the usual conda installers.
_BASE_NAMES = ("miniconda3", "anaconda3", "miniforge3", "mambaforge", "micromamba")


def activated_variables(prefix: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables with which a program runs in an environment, as its activation sets them.

    Args:
        prefix: the folder of the environment.
        environ: the environment variables before the activation.
    """
    variables = dict(environ)
    for name in ("PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV"):
        variables.pop(name, None)
    variables["PATH"] = os.pathsep.join(filter(None, [str(prefix / "bin"), variables.get("PATH", "")]))
    if (prefix / "conda-meta").is_dir():
        variables |= {"CONDA_PREFIX": str(prefix), "CONDA_DEFAULT_ENV": prefix.name}
    else:
        variables["VIRTUAL_ENV"] = str(prefix)
    return variables


def conda_bases(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Return the folders of the conda installations on this host; the installation in use comes first.

    Args:
        environ: the environment variables.
        home: the user's home folder.
    """
    programs = [environ.get("CONDA_EXE"), shutil.which("conda", path=environ.get("PATH", ""))]
    candidates = [Path(os.path.realpath(program)).parent.parent for program in programs if program]
    candidates += [parent / name for parent in (home, Path("/root"), Path("/opt")) for name in _BASE_NAMES]
    candidates += [Path("/opt/conda")]
    bases = []
    for folder in candidates:
        try:
            if (folder / "conda-meta").is_dir() and folder not in bases:
                bases.append(folder)
        except OSError:
            continue  # a folder that this user cannot read
    return bases


def conda_folders(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Return the folders for environments and packages in conda's settings that are below the home.

    Args:
        environ: the environment variables.
        home: the user's home folder, with .condarc.

    Raises:
        SpecError: conda's settings cannot be read.
    """
    settings = conda_settings.conda_settings(environ, home)
    variables = [environ.get(name) or "" for name in ("CONDA_ENVS_DIRS", "CONDA_ENVS_PATH", "CONDA_PKGS_DIRS")]
    paths = [path for value in variables for path in value.split(os.pathsep)]
    for key in ("envs_dirs", "envs_path", "pkgs_dirs"):
        value = settings.get(key)
        paths += value if isinstance(value, list) else [value] if value else []
    folders = [home / str(path).removeprefix("~/") for path in paths if path]
    return [folder for folder in folders if folder != home and folder.is_relative_to(home)]


class CondaLinkStep:
    """Links an environment into conda's folder, so that `conda activate NAME` and `conda env list` find it."""

    essential = False
    local = True

    def __init__(self, prefix: Path, home: Path, bases: list[Path], journal: Journal) -> None:
        """Store the arguments.

        Args:
            prefix: the folder of the environment.
            home: the user's home folder.
            bases: the folders of the conda installations.
            journal: the journal of the run.
        """
        self.name = f"conda sees {prefix.name}"
        self.prefix = prefix
        self.bases = bases
        self.journal = journal
        self.home = home
        # ~/.conda/envs is in conda's default envs_dirs, so no setting of the user has to change.
        self.link = home / ".conda" / "envs" / prefix.name

    def is_recorded(self, root: Root) -> bool:
        """Return whether an earlier run has made the link, so that it is made again even if conda is missing now."""
        return any(link.path == self.link for link in links.recorded(root, current(self.home)))

    def linked(self) -> Iterator[links.Link]:
        """Yield the link if it exists and leads to the prefix; otherwise yield nothing."""
        if link_target(self.link) == str(self.prefix):
            yield links.Link(self.link, self.prefix)

    def describe(self) -> str:
        """Return the text of this step in the plan."""
        return f"link {self.link} to {self.prefix}, so that `conda activate {self.prefix.name}` finds it"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no content to verify)
        """Check that the link exists.

        The state is ok too if the environment has no Python from conda, or if another environment has its name.
        """
        marker = read_owner(self.prefix)
        if marker is None or not python_source(marker).is_conda:
            return Check(State.OK, f"not a conda environment; activate it with: . {self.prefix}/bin/activate")
        base = next((base for base in self.bases if (base / "envs" / self.prefix.name).exists()), None)
        is_ours = self.link.is_symlink() and self.link.readlink() == self.prefix
        # A dangling link is kept too, because its target may be on a volume that is not mounted.
        if base is not None or (not is_ours and (self.link.is_symlink() or self.link.exists())):
            other = base / "envs" / self.prefix.name if base else self.link
            note = (
                f"conda uses the name {self.prefix.name} for {other}; to activate the environment in the root: "
                f"conda activate {self.prefix}"
            )
            return Check(State.OK, note, note)
        if is_ours:
            return Check(State.OK, f"conda activate {self.prefix.name}")
        return Check(State.DRIFTED, f"{self.link} does not exist")

    def apply(self) -> None:
        """Make the link."""
        make_folders(self.link.parent, self.journal)
        self.journal.record(EnvironmentLink(self.link, self.prefix))
        with OpenDir.at(self.link.parent) as parent:
            parent.symlink(self.link.name, str(self.prefix))
