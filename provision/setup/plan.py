"""Turns the spec and the facts into the list of steps, in order."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from provision.config import toml
from provision.config import torch as torch_config
from provision.core import layout
from provision.core.errors import SpecError
from provision.core.step import State
from provision.environments import activation
from provision.environments.definition import Wanted
from provision.environments.smoke_test import SmokeStep
from provision.environments.step import EnvStep
from provision.host import tool_caches, torch_build
from provision.installers import conda_settings
from provision.lockfiles import conda_lock, requirements
from provision.mirrors import catalogue, probe_files, record, selection, write_config
from provision.mirrors.selection import Needs
from provision.models import load_line, manifest, pins, stand_ins
from provision.models.hubs import Hubs
from provision.models.snapshots import SnapshotStep
from provision.models.step import ModelStep
from provision.relocation.login_step import LoginStep
from provision.relocation.relink_step import RecordStep
from provision.relocation.step import RelocateStep
from provision.volume import links
from provision.volume.marker import VolumeStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from provision.config.host import HostSpec, Relocated
    from provision.config.models import ModelSpec
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.host.facts import Facts
    from provision.mirrors.probe_files import Witness
    from provision.setup.request import Wish
    from provision.volume.journal import Journal


def needs(wanted: Wanted, models: Iterable[ModelSpec]) -> Needs:
    """What an environment and models need of mirrors.

    Raises:
        SpecError: a lock cannot be read.
    """
    variant = wanted.variants[0]
    lock = wanted.folder / f"{variant.name}.lock"
    hashes = requirements.hashes(lock.read_text(encoding="utf-8")) if lock.exists() else {}
    conda: list[Witness] = []
    channels: list[str] = []
    if wanted.conda_lock and wanted.platform and wanted.interpreter != "system":
        locked = [each for each in conda_lock.read_lock(wanted.conda_lock) if each.platform == wanted.platform]
        conda = probe_files.of_conda(wanted.folder, wanted.platform, locked)
        channels = sorted({each.url.removeprefix(f"{conda_settings.CHANNELS}/").partition("/")[0] for each in locked})
    found = {
        "pip": probe_files.of_pip(wanted.folder, variant.name, hashes),
        "torch": probe_files.of_torch(hashes),
        "conda": conda,
        "hf": probe_files.of_models(models),
    }
    return Needs(found, channels, variant)


_ASKED = ("environment.yml", "requirements.in")
_PLAIN = "requirements"  # the one lock of an environment without torch: requirements.lock


def steps(
    wish: Wish,
    facts: Facts,
    journal: Journal,
    progress: Progress,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Step]:
    """The steps that make this host ready.

    Args:
        wish: what is asked for.
        facts: the machine.
        journal: of this run.
        progress: told what is done of the step at work, and how much there is.
        tell: told what takes long.

    Raises:
        SpecError: the spec names an environment, variant or model that does not exist, or folders to relocate lie
            in each other or in the root's way.
    """
    root, host = wish.root, wish.host
    wanted = environment(wish.envs, host, facts)
    known_models = manifest_of(wish)
    picked = {known_models.name(name): known_models.pick(name) for name in host.models}
    hubs = Hubs(root, os.environ, offline=wish.offline)
    bases = activation.conda_bases(os.environ, wish.home)
    conda = activation.CondaLinkStep(root.prefix(host.env), wish.home, bases, journal)
    named = activation.conda_folders(os.environ, wish.home) if "conda" in wish.chosen.relocate else []
    places = tool_caches.places(wish.chosen.relocate, root, os.environ, wish.home, bases, named)
    known = [place.source for group in places.values() for place in group]
    recorded = [link for link in links.recorded(root, wish.home) if link.path not in {*known, conda.link}]
    if recorded:
        places["what is on record"] = [tool_caches.Place(link.path, link.target) for link in recorded]
    moved = [RelocateStep(label, group, root, wish.home, journal, progress) for label, group in places.items()]
    has_conda_link = conda.is_recorded(root) or (bases and wanted.conda_lock is not None)
    leading = [*known, *tool_caches.link_paths(os.environ, wish.home)]
    built: list[Step] = [VolumeStep(root, leading, journal, wish.chosen.warning), *moved]
    mirrors, settings = _mirrors(wish, facts, journal, conda_is_here=bool(bases))
    built += mirrors
    built.append(EnvStep(root, wanted, wish.home, journal, offline=wish.offline, progress=progress, tell=tell))
    built += settings
    if has_conda_link:
        built.append(conda)
    if moved or has_conda_link or root.links.exists():
        built.append(RecordStep(root, wish.home, [*moved, conda], journal))
    login = LoginStep(root, wish.home, os.environ, journal, wanted=host.login)
    if host.login or login.check().state is not State.OK:
        built.append(login)
    if host.models or "huggingface" in places:
        built.append(SnapshotStep(root, [pins.apply(root, each) for each in known_models.every()], journal))
    python = layout.interpreter(root.prefix(host.env))
    built += [
        ModelStep(
            root,
            name,
            model,
            hubs,
            retry=wish.retry,
            progress=progress,
            build=partial(stand_ins.build, root, name, model, wish.envs, python, unasked=True),
            tell=tell,
            pinned=known_models.revisions(model.repo),
            architecture=load_line.known(wish.envs, model),
        )
        for name, model in picked.items()
    ]
    if wanted.variants[0].torch:
        built.append(SmokeStep(root, host.env))
    return built


def _mirrors(wish: Wish, facts: Facts, journal: Journal, *, conda_is_here: bool) -> tuple[list[Step], list[Step]]:
    """What chooses the mirrors, before the environment is made, and what writes them down, after it."""
    root, known = wish.root, catalogue_of(wish)
    wanted = selection.wanted_of(_by_tool(wish.host.mirror), known)
    there = record.read(root) is not None
    choosing_is_wanted = wish.rechoose or (known.names() and set(wanted.values()) != {"keep"})
    chooser = selection.MirrorStep(
        root,
        wanted,
        known,
        lambda: needs_of(wish, facts),
        os.environ,
        wish.home,
        journal,
        offline=wish.offline,
        again=wish.rechoose,
        nodefaults=wish.nodefaults,
    )
    prefix = root.prefix(wish.host.env)
    writer = write_config.SettingsStep(root, prefix, wish.home, os.environ, journal, conda_is_here=conda_is_here)
    return [chooser] if choosing_is_wanted else [], [writer] if choosing_is_wanted or there else []


def _by_tool(asked: str | Mapping[Any, str]) -> str | dict[str, str]:
    return asked if isinstance(asked, str) else {str(tool): name for tool, name in asked.items()}


def catalogue_of(wish: Wish) -> catalogue.Catalogue:
    """The shipped mirrors, and those that the user adds.

    Raises:
        SpecError: a catalogue is wrong.
    """
    return catalogue.load(wish.envs / "mirrors.toml", wish.host.catalogue)


def manifest_of(wish: Wish) -> manifest.Manifest:
    """The shipped models, and those that the user adds.

    Raises:
        SpecError: a manifest is wrong.
    """
    return manifest.load(wish.envs / "models.toml", wish.host.manifest)


def needs_of(wish: Wish, facts: Facts) -> selection.Needs:
    """What this host needs of mirrors: its environment's locks; its models, or all that the manifest has.

    Raises:
        SpecError: a lock or the manifest is wrong.
    """
    known = manifest_of(wish)
    models = [known.pick(name) for name in wish.host.models] or list(known.models.values())
    return needs(environment(wish.envs, wish.host, facts), models)


def with_mirrors(wish: Wish, mirror: dict[str, str], *, nodefaults: bool) -> Wish:
    """The same wish with these mirrors, chosen anew."""
    host = wish.host.model_copy(update={"mirror": mirror})
    return replace(wish, host=host, rechoose=True, nodefaults=nodefaults)


def with_relocated(wish: Wish, thing: Relocated) -> Wish:
    """The same wish with one more thing relocated; what is there already is not doubled.

    Raises:
        SpecError: no root is named.
    """
    if not wish.chosen.named:
        raise SpecError("there is no folder that survives to move it to: name one with --root DIR.")
    others = [each for each in wish.chosen.relocate if each != thing]
    return replace(wish, chosen=replace(wish.chosen, relocate=[*others, thing]))


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
        raise SpecError(f"{envs / host.env} is not locked yet. Run `{layout.program()} env lock {host.env}`.")
    folder = envs / toml.choose(host.env, environments(envs), "environment")
    torch = toml.load(envs / "torch.toml", torch_config.TorchSpec)
    if (folder / "environment.yml").exists():
        conda_lock.read_environment(folder / "environment.yml")
    locked = [file.stem for file in folder.glob("*.lock")]
    if any(variant.name in locked for variant in torch.variant):
        choice = torch_build.choose(facts, torch, host.variant, locked)
    else:
        name = toml.choose(host.variant, ["auto", _PLAIN], "variant")
        choice = torch_build.Choice([torch_config.Variant(name=_PLAIN)], f"{name}: it has no build of torch")
    platform = conda_lock.subdir(facts.system, facts.machine)
    return Wanted(
        host.env, folder, choice.variants, torch.python, host.interpreter, platform, choice.reason, choice.warning
    )
