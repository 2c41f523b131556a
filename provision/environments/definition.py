"""Resolves what an environment is made of: its folder under envs/, and the builds of torch that fit the machine."""

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
_PLAIN = "requirements"  # the one lock of an environment without torch: requirements.lock


@dataclass(frozen=True)
class EnvironmentDefinition:
    """What an environment is made of.

    `locks` is the folder of its locks; `variants` is the wanted one first, then its stand-ins; `pythons` are the
    versions that the locks hold wheels for; `interpreter` is auto, conda or system; `platform` is conda's name of this
    machine; `reason` says why the variant, `warning` what its owner should know of it.
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
        """Return the source of python that is asked for."""
        return PythonSource(self.interpreter)

    @property
    def conda_lock(self) -> Path | None:
        """The lock of the conda part, where there is one."""
        return self.locks.conda_file if self.locks.conda_file.exists() else None


def names(envs: Path) -> list[str]:
    """Return the names of the environments of an envs/ folder: every folder with a lock, except the toolbox."""
    folders = [folder for folder in envs.iterdir() if folder.is_dir() and folder.name != "toolbox"]
    return sorted(
        folder.name for folder in folders if any(folder.glob("*.lock")) or (folder / "conda-lock.yml").exists()
    )


def resolve(envs: Path, host: HostSpec, facts: HostFacts) -> EnvironmentDefinition:
    """Resolve the environment of a host.

    Args:
        envs: the folder that holds torch.toml and a folder for each environment.
        host: names the environment, its variant and its interpreter.
        facts: of the machine that the variant must fit.

    Raises:
        SpecError: there is no such environment, it is not locked, no variant fits, or it mixes conda and pip.
    """
    if host.env not in names(envs) and any((envs / host.env / file).exists() for file in _INPUTS):
        raise SpecError(f"{envs / host.env} is not locked yet. Run `{layout.program()} env lock {host.env}`.")
    folder = envs / toml.choose(host.env, names(envs), "environment")
    torch = toml.load(envs / "torch.toml", torch_config.TorchSpec)
    locks = LockFolder(folder)
    locks.environment()  # a package that is asked of conda and of pip is refused before any step begins
    locked = [file.stem for file in folder.glob("*.lock")]
    if any(variant.name in locked for variant in torch.variant):
        choice = torch_build.choose(facts, torch, host.variant, locked)
    else:
        name = toml.choose(host.variant, ["auto", _PLAIN], "variant")
        choice = torch_build.TorchChoice([torch_config.Variant(name=_PLAIN)], f"{name}: it has no build of torch")
    platform = conda_lock.subdir(facts.system, facts.machine)
    return EnvironmentDefinition(
        host.env, locks, choice.variants, torch.python, host.interpreter, platform, choice.reason, choice.warning
    )
