"""Turns the spec and the facts into the list of steps, in order."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision import activation, conda_lock, paths, spec
from provision.environment import EnvStep, Wanted
from provision.errors import SpecError
from provision.hub import Hub
from provision.models import ModelStep
from provision.relocate import RelocateStep
from provision.smoke import SmokeStep
from provision.volume import VolumeStep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
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
        SpecError: there is none of this name, no variant fits, or its environment.yml mixes conda and pip.
    """
    folder = envs / spec.choose(host.env, environments(envs), "environment")
    torch = spec.load(envs / "torch.toml", spec.TorchSpec)
    if (folder / "environment.yml").exists():
        conda_lock.read_environment(folder / "environment.yml")
    locked = [file.stem for file in folder.glob("*.lock")]
    if any(variant.name in locked for variant in torch.variant):
        choice = choose_variants(facts, torch, host.variant, locked)
    else:
        name = spec.choose(host.variant, ["auto", PLAIN], "variant")
        choice = Choice([spec.Variant(name=PLAIN)], f"{name}: it has no build of torch")
    platform = conda_lock.subdir(facts.system, facts.machine)
    return Wanted(
        host.env, folder, choice.variants, torch.python, host.interpreter, platform, choice.reason, choice.warning
    )


PLAIN = "requirements"  # the one lock of an environment without torch: requirements.lock


@dataclass(frozen=True)
class Choice:
    """The variant for a machine, then its stand-ins; why; and what its owner should know."""

    variants: list[Variant]
    reason: str
    warning: str | None = None


def choose_variants(facts: Facts, torch: TorchSpec, wanted: str, locked: list[str]) -> Choice:
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
    warning = None
    if wanted != "auto":
        chosen = known[spec.choose(wanted, list(known), "variant")]
        reason = "chosen by you"
        if chosen.system != facts.system:
            raise SpecError(f"the variant {wanted} is for {chosen.system}, this machine is {facts.system}.")
    else:
        unfit = {name: why for name, variant in known.items() if (why := _unfit(facts, variant, torch.older_cards))}
        fitting = [variant for name, variant in known.items() if name not in unfit]
        if not fitting:
            have = ", ".join(f"{variant.name} ({variant.system})" for variant in known.values())
            raise SpecError(f"no lock fits this machine ({facts.system} {facts.machine}); there is: {have}.")
        chosen = fitting[0]
        better = list(known)[: list(known).index(chosen.name)]
        names: dict[str, list[str]] = {}
        for name in better:
            if known[name].system == facts.system:
                names.setdefault(unfit[name], []).append(name)
        reason = "; ".join(f"{', '.join(each)}: {why}" for why, each in names.items()) or "the first that fits"
        if facts.nvidia_driver and not chosen.architectures:
            cards = ", ".join(gpu.name for gpu in facts.gpus)
            here = f"{cards}, driver {facts.nvidia_driver}" if cards else f"driver {facts.nvidia_driver}, no card"
            warning = f"torch for the CPU, though this machine has {here}: {reason}"
    instead = [known[chosen.instead]] if chosen.instead in known else []
    return Choice([chosen, *instead], reason, warning)


def _unfit(facts: Facts, variant: Variant, older_cards: Mapping[str, str]) -> str | None:
    """Why a variant does not fit, or None."""
    if variant.system != facts.system or variant.machine not in {None, facts.machine.lower()}:
        return f"is for {variant.system} {variant.machine or ''}".rstrip()
    if variant.driver is None:
        return None
    if facts.nvidia_driver is None or not facts.gpus:
        what = "card, and none is visible here" if facts.nvidia_driver else "driver, and none is here"
        return f"needs an NVIDIA {what}"
    for gpu in facts.gpus:
        capability = gpu.compute_capability or _capability(gpu.name, older_cards)
        if capability and not _runs(capability, variant.architectures):
            return f"has no code for {gpu.name} (compute capability {capability})"
    if _numbers(facts.nvidia_driver) < _numbers(variant.driver):
        return f"needs driver {variant.driver} or newer, here is {facts.nvidia_driver}"
    return None


def _capability(name: str, older_cards: Mapping[str, str]) -> str | None:
    """The compute capability of a card by its name: the longest part of it that is known."""
    known = [part for part in older_cards if re.search(rf"\b{re.escape(part)}", name)]
    return older_cards[max(known, key=len)] if known else None


def _runs(capability: str, architectures: Sequence[str]) -> bool:
    """Machine code for X.Y runs on X.Z with Z >= Y (source: CUDA's programming guide, binary compatibility)."""
    card = _numbers(capability)
    return any(card[0] == _numbers(each)[0] and card >= _numbers(each) for each in architectures)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
