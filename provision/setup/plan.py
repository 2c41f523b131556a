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
from provision.environments.definition import EnvironmentDefinition
from provision.environments.smoke_test import SmokeStep
from provision.environments.step import EnvStep
from provision.host import tool_caches, torch_build
from provision.lockfiles import conda_lock, requirements
from provision.mirrors import catalogue, record, selection, write_config
from provision.mirrors.probe_needs import ProbeNeeds
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
    from provision.host.facts import HostFacts
    from provision.lockfiles.conda_lock import CondaPackage
    from provision.setup.request import SetupRequest
    from provision.volume.journal import Journal


def needs(wanted: EnvironmentDefinition, models: Iterable[ModelSpec]) -> ProbeNeeds:
    """What an environment and models need of mirrors.

    Raises:
        SpecError: a lock cannot be read.
    """
    variant = wanted.variants[0]
    lock = wanted.folder / f"{variant.name}.lock"
    hashes = requirements.hashes(lock.read_text(encoding="utf-8")) if lock.exists() else {}
    conda: list[CondaPackage] = []
    if wanted.conda_lock and wanted.platform and not wanted.python_source.is_system:
        conda = [each for each in conda_lock.read_lock(wanted.conda_lock) if each.platform == wanted.platform]
    return ProbeNeeds(wanted.folder, variant, hashes, wanted.platform, conda, list(models))


_ASKED = ("environment.yml", "requirements.in")
_PLAIN = "requirements"  # the one lock of an environment without torch: requirements.lock


def steps(
    request: SetupRequest,
    facts: HostFacts,
    journal: Journal,
    progress: Progress,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Step]:
    """The steps that make this host ready.

    Args:
        request: what is asked for.
        facts: the machine.
        journal: of this run.
        progress: told what is done of the step at work, and how much there is.
        tell: told what takes long.

    Raises:
        SpecError: the spec names an environment, variant or model that does not exist, or folders to relocate lie
            in each other or in the root's way.
    """
    root, host = request.root, request.host
    wanted = environment(request.envs, host, facts)
    known_models = manifest_of(request)
    picked = {known_models.name(name): known_models.pick(name) for name in host.models}
    hubs = Hubs(root, os.environ, offline=request.offline)
    bases = activation.conda_bases(os.environ, request.home)
    conda = activation.CondaLinkStep(root.prefix(host.env), request.home, bases, journal)
    named = activation.conda_folders(os.environ, request.home) if "conda" in request.chosen.relocate else []
    places = tool_caches.places(request.chosen.relocate, root, os.environ, request.home, bases, named)
    known = [place.source for group in places.values() for place in group]
    recorded = [link for link in links.recorded(root, request.home) if link.path not in {*known, conda.link}]
    if recorded:
        places["what is on record"] = [tool_caches.RelocatedFolder(link.path, link.target) for link in recorded]
    moved = [RelocateStep(label, group, root, request.home, journal, progress) for label, group in places.items()]
    has_conda_link = conda.is_recorded(root) or (bases and wanted.conda_lock is not None)
    leading = [*known, *tool_caches.link_paths(os.environ, request.home)]
    built: list[Step] = [VolumeStep(root, leading, journal, request.chosen.warning), *moved]
    mirrors, settings = _mirrors(request, facts, journal, conda_is_here=bool(bases))
    built += mirrors
    built.append(EnvStep(root, wanted, request.home, journal, offline=request.offline, progress=progress, tell=tell))
    built += settings
    if has_conda_link:
        built.append(conda)
    if moved or has_conda_link or root.links.exists():
        built.append(RecordStep(root, request.home, [*moved, conda], journal))
    login = LoginStep(root, request.home, os.environ, journal, wanted=host.login)
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
            retry=request.retry,
            progress=progress,
            build=partial(stand_ins.build, root, name, model, request.envs, python, unasked=True),
            tell=tell,
            pinned=known_models.revisions(model.repo),
            architecture=load_line.known(request.envs, model),
        )
        for name, model in picked.items()
    ]
    if wanted.variants[0].torch:
        built.append(SmokeStep(root, host.env))
    return built


def _mirrors(
    request: SetupRequest, facts: HostFacts, journal: Journal, *, conda_is_here: bool
) -> tuple[list[Step], list[Step]]:
    """What chooses the mirrors, before the environment is made, and what writes them down, after it."""
    root, known = request.root, catalogue_of(request)
    wanted = selection.wanted_of(_by_tool(request.host.mirror), known)
    there = record.read(root) is not None
    choosing_is_wanted = request.rechoose or (known.names() and set(wanted.values()) != {"keep"})
    chooser = selection.MirrorStep(
        root,
        wanted,
        known,
        lambda: needs_of(request, facts),
        os.environ,
        request.home,
        journal,
        offline=request.offline,
        again=request.rechoose,
        nodefaults=request.nodefaults,
    )
    prefix = root.prefix(request.host.env)
    writer = write_config.SettingsStep(root, prefix, request.home, os.environ, journal, conda_is_here=conda_is_here)
    return [chooser] if choosing_is_wanted else [], [writer] if choosing_is_wanted or there else []


def _by_tool(asked: str | Mapping[Any, str]) -> str | dict[str, str]:
    return asked if isinstance(asked, str) else {str(tool): name for tool, name in asked.items()}


def catalogue_of(request: SetupRequest) -> catalogue.Catalogue:
    """The shipped mirrors, and those that the user adds.

    Raises:
        SpecError: a catalogue is wrong.
    """
    return catalogue.load(request.envs / "mirrors.toml", request.host.catalogue)


def manifest_of(request: SetupRequest) -> manifest.Manifest:
    """The shipped models, and those that the user adds.

    Raises:
        SpecError: a manifest is wrong.
    """
    return manifest.load(request.envs / "models.toml", request.host.manifest)


def needs_of(request: SetupRequest, facts: HostFacts) -> ProbeNeeds:
    """What this host needs of mirrors: its environment's locks; its models, or all that the manifest has.

    Raises:
        SpecError: a lock or the manifest is wrong.
    """
    known = manifest_of(request)
    models = [known.pick(name) for name in request.host.models] or list(known.models.values())
    return needs(environment(request.envs, request.host, facts), models)


def with_mirrors(request: SetupRequest, mirror: dict[str, str], *, nodefaults: bool) -> SetupRequest:
    """The same request with these mirrors, chosen anew."""
    host = request.host.model_copy(update={"mirror": mirror})
    return replace(request, host=host, rechoose=True, nodefaults=nodefaults)


def with_relocated(request: SetupRequest, thing: Relocated) -> SetupRequest:
    """The same request with one more thing relocated; what is there already is not doubled.

    Raises:
        SpecError: no root is named.
    """
    if not request.chosen.named:
        raise SpecError("there is no folder that survives to move it to: name one with --root DIR.")
    others = [each for each in request.chosen.relocate if each != thing]
    return replace(request, chosen=replace(request.chosen, relocate=[*others, thing]))


def environments(envs: Path) -> list[str]:
    """The names of the environments: every folder with a lock, the toolbox left out."""
    folders = [folder for folder in envs.iterdir() if folder.is_dir() and folder.name != "toolbox"]
    return sorted(
        folder.name for folder in folders if any(folder.glob("*.lock")) or (folder / "conda-lock.yml").exists()
    )


def environment(envs: Path, host: HostSpec, facts: HostFacts) -> EnvironmentDefinition:
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
        choice = torch_build.TorchChoice([torch_config.Variant(name=_PLAIN)], f"{name}: it has no build of torch")
    platform = conda_lock.subdir(facts.system, facts.machine)
    return EnvironmentDefinition(
        host.env, folder, choice.variants, torch.python, host.interpreter, platform, choice.reason, choice.warning
    )
