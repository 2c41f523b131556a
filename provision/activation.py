"""How an environment is entered: the variables of an activated one, and the link by which conda finds ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from provision.environment import read_owner
from provision.step import Check, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.journal import Journal

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
        # One of conda's own default envs_dirs, so no setting of the user's is touched.
        self.link = home / ".conda" / "envs" / prefix.name

    def describe(self) -> str:
        """The plan's line."""
        return f"link {self.link} to {self.prefix}, so that `conda activate {self.prefix.name}` finds it"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (a link has no depth)
        """Look at the link, and for an environment of conda's own that has the name."""
        owner = read_owner(self.prefix)
        if owner is None or owner.get("interpreter") != "conda":
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
        self.journal.record("link", source=self.link, target=self.prefix)
        self.link.parent.mkdir(parents=True, exist_ok=True)
        self.link.symlink_to(self.prefix)
