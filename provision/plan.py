"""Turns the spec and the facts into the list of steps, in order."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision import activation, conda_lock, paths, spec, variants
from provision.environment import EnvStep, Wanted
from provision.errors import SpecError
from provision.hub import Hub
from provision.models import ModelStep
from provision.relocate import RelocateStep
from provision.smoke import SmokeStep
from provision.volume import VolumeStep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from provision.facts import Facts
    from provision.journal import Journal
    from provision.spec import HostSpec
    from provision.step import Step

_ASKED = ("environment.yml", "requirements.in")
_PLAIN = "requirements"  # the one lock of an environment without torch: requirements.lock


@dataclass(frozen=True)
class Wish:
    """What a run is asked for: the person's spec, and where things are.

    `envs` is the folder of environments, models and variants; `retry` looks again for a silent hub.
    """

    root: paths.Root
    host: HostSpec
    envs: Path
    home: Path
    offline: bool
    retry: bool


def steps(wish: Wish, facts: Facts, journal: Journal, progress: Callable[[int, int], None]) -> list[Step]:
    """The steps that make this host ready.

    Raises:
        SpecError: the spec names an environment, variant or model that does not exist, or the root lies inside a
            folder that is to be moved.
    """
    root, host = wish.root, wish.host
    wanted = environment(wish.envs, host, facts)
    manifest = spec.load_tables(wish.envs / "models.toml", spec.ModelSpec)
    for name in host.models:
        spec.choose(name, list(manifest), "model")
    hub_link = paths.hub_cache(os.environ, wish.home)
    relocated = [("huggingface", hub_link, root.hub)] if "huggingface" in host.relocate else []
    for _, source, _ in relocated:
        if root.path.resolve().is_relative_to(source.resolve()):
            raise SpecError(f"the root {root.path} lies inside {source}, which is to be moved onto it. Give another.")
    hub = Hub(os.environ, offline=wish.offline)
    built: list[Step] = [VolumeStep(root, [source for _, source, _ in relocated], journal)]
    built += [RelocateStep(label, source, target, journal) for label, source, target in relocated]
    built.append(EnvStep(root, wanted, wish.home, journal, offline=wish.offline))
    bases = activation.conda_bases(os.environ, wish.home)
    if bases and wanted.conda_lock is not None:
        built.append(activation.CondaLinkStep(root.prefix(host.env), wish.home, bases, journal))
    for name in host.models:
        built.append(ModelStep(root, name, manifest[name], hub, retry=wish.retry, progress=progress))
    if wanted.variants[0].torch:
        built.append(SmokeStep(root, host.env))
    return built


def environments(envs: Path) -> list[str]:
    """The names of the environments: every folder with a lock, the toolbox left out."""
    folders = [folder for folder in envs.iterdir() if folder.is_dir() and folder.name != "toolbox"]
    return sorted(
        folder.name for folder in folders if any(folder.glob("*.lock")) or (folder / "conda-lock.yml").exists()
    )


def environment(envs: Path, host: HostSpec, facts: Facts) -> Wanted:
    """What the environment of a host is made of.

    Raises:
        SpecError: there is none of this name, it is not locked, no variant fits, or it mixes conda and pip.
    """
    if host.env not in environments(envs) and any((envs / host.env / asked).exists() for asked in _ASKED):
        raise SpecError(f"{envs / host.env} is not locked yet. Run `{paths.program()} env lock {host.env}`.")
    folder = envs / spec.choose(host.env, environments(envs), "environment")
    torch = spec.load(envs / "torch.toml", spec.TorchSpec)
    if (folder / "environment.yml").exists():
        conda_lock.read_environment(folder / "environment.yml")
    locked = [file.stem for file in folder.glob("*.lock")]
    if any(variant.name in locked for variant in torch.variant):
        choice = variants.choose(facts, torch, host.variant, locked)
    else:
        name = spec.choose(host.variant, ["auto", _PLAIN], "variant")
        choice = variants.Choice([spec.Variant(name=_PLAIN)], f"{name}: it has no build of torch")
    platform = conda_lock.subdir(facts.system, facts.machine)
    return Wanted(
        host.env, folder, choice.variants, torch.python, host.interpreter, platform, choice.reason, choice.warning
    )
