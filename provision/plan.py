"""Turns the spec and the facts into the list of steps, in order."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision import paths, spec
from provision.errors import SpecError
from provision.hub import Hub
from provision.models import ModelStep
from provision.pip_env import PipEnvStep
from provision.relocate import RelocateStep
from provision.smoke import SmokeStep
from provision.volume import VolumeStep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from provision.facts import Facts
    from provision.journal import Journal
    from provision.spec import HostSpec, TorchSpec, Variant
    from provision.step import Step


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
    env_folder = environment(wish.envs, host.env)
    torch = spec.load(wish.envs / "torch.toml", spec.TorchSpec)
    variants, _ = choose_variants(facts, torch, host.variant, [file.stem for file in env_folder.glob("*.lock")])
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
    built.append(
        PipEnvStep(root, host.env, env_folder, variants, torch.python, journal, offline=wish.offline),
    )
    for name in host.models:
        built.append(ModelStep(root, name, manifest[name], hub, retry=wish.retry, progress=progress))
    built.append(SmokeStep(root, host.env))
    return built


def environment(envs: Path, name: str) -> Path:
    """The data folder of an environment.

    Raises:
        SpecError: there is none of this name.
    """
    known = sorted(folder.name for folder in envs.iterdir() if any(folder.glob("*.lock")) and folder.name != "toolbox")
    return envs / spec.choose(name, known, "environment")


def choose_variants(facts: Facts, torch: TorchSpec, wanted: str, locked: list[str]) -> tuple[list[Variant], str]:
    """The variant for this machine, then what stands in where its wheel cannot be had; and why.

    Args:
        facts: the machine.
        torch: the variants, best first.
        wanted: "auto", or a variant's name.
        locked: the variants that the environment has a lock for.

    Raises:
        SpecError: no such variant, or none fits.
    """
    known = {variant.name: variant for variant in torch.variant if variant.name in locked}
    if wanted != "auto":
        chosen = known[spec.choose(wanted, list(known), "variant")]
        reason = "chosen by you"
    else:
        fitting = [variant for variant in known.values() if not _unfit(facts, variant)]
        if facts.system != "linux" or not fitting:
            raise SpecError(f"no lock fits this machine ({facts.system}); there is: {', '.join(known)} for linux.")
        chosen = fitting[0]
        passed_over = [f"{name} {_unfit(facts, known[name])}" for name in known if _unfit(facts, known[name])]
        reason = "; ".join(passed_over) or "the first that fits"
    instead = [known[chosen.instead]] if chosen.instead in known else []
    return [chosen, *instead], reason


def _unfit(facts: Facts, variant: Variant) -> str | None:
    """Why a variant does not fit, or None."""
    if variant.driver is None:
        return None
    if facts.nvidia_driver is None or not facts.gpus:
        return "needs an NVIDIA card and driver, and none is here"
    if _numbers(facts.nvidia_driver) < _numbers(variant.driver):
        return f"needs driver {variant.driver}, here is {facts.nvidia_driver}"
    least = variant.compute_capability
    for gpu in facts.gpus:
        if least and gpu.compute_capability and _numbers(gpu.compute_capability) < _numbers(least):
            return f"needs compute capability {least}, {gpu.name} has {gpu.compute_capability}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
