"""Resolves the definition of an environment: its lock files, and the variants of torch that run on this host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.config import toml
from provision.config import torch as torch_config
from provision.core import layout
from provision.core.errors import SpecError
from provision.core.python_source import PythonSource
from provision.host import torch_build
from provision.lockfiles import conda_lock
from provision.lockfiles.folder import LockFolder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from provision.config.host import HostSpec
    from provision.config.torch import Variant
    from provision.host.facts import HostFacts

_INPUTS = ("environment.yml", "requirements.in")
_PLAIN = "requirements"  # an environment without torch has one pip lock file, requirements.lock


@dataclass(frozen=True)
class EnvironmentDefinition:
    """Describe what an environment is made of.

    `name`: the name of the environment. `locks`: its lock folder.
    `variants`: the chosen variant of torch first, then its fallbacks.
    `pythons`: the Python versions for which the lock files have wheels, such as "3.11", the best first.
    `interpreter`: the requested source of Python: "auto", "conda" or "system".
    `platform`: conda's name of this host's platform; None if conda has no name for it.
    `reason`: why the variant was chosen, as text. `warning`: a text for the user about the variant, or None.
    """

    name: str
    locks: LockFolder
    variants: Sequence[Variant]
    pythons: Sequence[str]
    interpreter: str
    platform: str | None
    reason: str
    warning: str | None = None

    @property
    def python_source(self) -> PythonSource:
        """Return the requested source of Python."""
        return PythonSource(self.interpreter)

    @property
    def conda_lock(self) -> Path | None:
        """Return the path of the conda lock file; None if it does not exist."""
        return self.locks.conda_file if self.locks.conda_file.exists() else None


def names(envs: Path) -> list[str]:
    """Return the sorted names of the environments: the folders in `envs` with a lock file, except "toolbox"."""
    folders = [folder for folder in envs.iterdir() if folder.is_dir() and folder.name != "toolbox"]
    return sorted(
        folder.name for folder in folders if any(folder.glob("*.lock")) or (folder / "conda-lock.yml").exists()
    )


def resolve(envs: Path, host: HostSpec, facts: HostFacts) -> EnvironmentDefinition:
    """Return the definition of a host's environment.

    Args:
        envs: the folder with torch.toml and a folder for each environment.
        host: the host definition, with the requested environment, variant and interpreter.
        facts: the facts of the host on which the variant must run.

    Raises:
        SpecError: the environment does not exist or has no lock file, no variant runs on the host, or environment.yml
            requires the same package from conda and pip.
    """
    if host.env not in names(envs) and any((envs / host.env / file).exists() for file in _INPUTS):
        raise SpecError(f"{envs / host.env} is not locked yet. Run `{layout.program()} env lock {host.env}`.")
    folder = envs / toml.choose(host.env, names(envs), "environment")
    torch = toml.load(envs / "torch.toml", torch_config.TorchSpec)
    locks = LockFolder(folder)
    locks.environment()  # raises an error about environment.yml before any step begins
    locked = [file.stem for file in folder.glob("*.lock")]
    if any(variant.name in locked for variant in torch.variant):
        choice = torch_build.choose(facts, torch, host.variant, locked)
    else:
        name = toml.choose(host.variant, ["auto", _PLAIN], "variant")
        choice = torch_build.TorchChoice([torch_config.Variant(name=_PLAIN)], f"{name}: this environment has no torch")
    platform = conda_lock.subdir(facts.system, facts.machine)
    return EnvironmentDefinition(
        host.env, locks, choice.variants, torch.python, host.interpreter, platform, choice.reason, choice.warning
    )
