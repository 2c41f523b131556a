"""Turns the spec and the facts into the list of steps, in order."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from provision.core import layout
from provision.core.step import State
from provision.environments import activation
from provision.environments.smoke_test import SmokeStep
from provision.environments.step import EnvStep
from provision.host import tool_caches
from provision.mirrors import record, selection, write_config
from provision.mirrors.probe_needs import ProbeNeeds
from provision.models import load_line, pins, stand_ins
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

    from provision.config.models import ModelSpec
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.environments.definition import EnvironmentDefinition
    from provision.lockfiles.conda_lock import CondaPackage
    from provision.setup.host_plan import HostDefinition, HostPlan
    from provision.volume.journal import Journal


def needs(environment: EnvironmentDefinition, models: Iterable[ModelSpec]) -> ProbeNeeds:
    """Return the locked files of an environment and the models that the mirrors must hold.

    Raises:
        SpecError: a lock cannot be read.
    """
    variant, locks = environment.variants[0], environment.locks
    hashes = locks.hashes(variant.name) if locks.pip_file(variant.name).exists() else {}
    conda: list[CondaPackage] = []
    if environment.conda_lock and environment.platform and not environment.python_source.is_system:
        conda = [package for package in locks.conda_packages() if package.platform == environment.platform]
    return ProbeNeeds(locks.path, variant, hashes, environment.platform, conda, list(models))


def steps(
    plan: HostPlan,
    journal: Journal,
    progress: Progress,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Step]:
    """The steps that make this host ready.

    Args:
        plan: of the host.
        journal: of this run.
        progress: told what is done of the step at work, and how much there is.
        tell: told what takes long.

    Raises:
        SpecError: the spec names an environment, variant or model that does not exist, or folders to relocate lie
            in each other or in the root's way.
    """
    root, host, envs = plan.root, plan.host, plan.definition.envs
    wanted = plan.definition.environment
    known_models = plan.definition.manifest
    picked = {known_models.name(name): known_models.pick(name) for name in host.models}
    hubs = Hubs(root, os.environ, offline=plan.offline)
    bases = activation.conda_bases(os.environ, plan.home)
    conda = activation.CondaLinkStep(root.prefix(host.env), plan.home, bases, journal)
    named = activation.conda_folders(os.environ, plan.home) if "conda" in plan.chosen.relocate else []
    places = tool_caches.places(plan.chosen.relocate, root, os.environ, plan.home, bases, named)
    known = [place.source for group in places.values() for place in group]
    recorded = [link for link in links.recorded(root, plan.home) if link.path not in {*known, conda.link}]
    if recorded:
        places["what is on record"] = [tool_caches.RelocatedFolder(link.path, link.target) for link in recorded]
    moved = [RelocateStep(label, group, root, plan.home, journal, progress) for label, group in places.items()]
    has_conda_link = conda.is_recorded(root) or (bases and wanted.conda_lock is not None)
    leading = [*known, *tool_caches.link_paths(os.environ, plan.home)]
    built: list[Step] = [VolumeStep(root, leading, journal, plan.chosen.warning), *moved]
    mirrors, settings = _mirrors(plan, journal, conda_is_here=bool(bases))
    built += mirrors
    built.append(EnvStep(root, wanted, plan.home, journal, offline=plan.offline, progress=progress, tell=tell))
    built += settings
    if has_conda_link:
        built.append(conda)
    if moved or has_conda_link or root.links.exists():
        built.append(RecordStep(root, plan.home, [*moved, conda], journal))
    login = LoginStep(root, plan.home, os.environ, journal, wanted=host.login)
    if host.login or login.check().state is not State.OK:
        built.append(login)
    if host.models or "huggingface" in places:
        built.append(SnapshotStep(root, [pins.apply(root, each) for each in known_models.with_all_extras()], journal))
    python = layout.interpreter(root.prefix(host.env))
    built += [
        ModelStep(
            root,
            name,
            model,
            hubs,
            retry=plan.retry,
            progress=progress,
            build=partial(stand_ins.build, root, name, model, envs, python, is_automatic=True),
            tell=tell,
            pinned=known_models.revisions(model.repo),
            architecture=load_line.architecture_of(envs, model),
        )
        for name, model in picked.items()
    ]
    if wanted.variants[0].torch:
        built.append(SmokeStep(root, host.env))
    return built


def _mirrors(plan: HostPlan, journal: Journal, *, conda_is_here: bool) -> tuple[list[Step], list[Step]]:
    """What chooses the mirrors, before the environment is made, and what writes them down, after it."""
    root, known = plan.root, plan.definition.catalogue
    wanted = selection.requested_mirrors(_by_tool(plan.mirror), known)
    there = record.read(root) is not None
    choosing_is_wanted = plan.rechoose or (known.names() and set(wanted.values()) != {"keep"})
    chooser = selection.MirrorStep(
        root,
        wanted,
        known,
        lambda: needs_of(plan.definition),
        os.environ,
        plan.home,
        journal,
        offline=plan.offline,
        again=plan.rechoose,
        nodefaults=plan.nodefaults,
    )
    prefix = root.prefix(plan.host.env)
    writer = write_config.SettingsStep(root, prefix, plan.home, os.environ, journal, conda_is_here=conda_is_here)
    return [chooser] if choosing_is_wanted else [], [writer] if choosing_is_wanted or there else []


def _by_tool(asked: str | Mapping[Any, str]) -> str | dict[str, str]:
    return asked if isinstance(asked, str) else {str(tool): name for tool, name in asked.items()}


def needs_of(definition: HostDefinition) -> ProbeNeeds:
    """What this host needs of mirrors: its environment's locks; its models, or all that the manifest has.

    Raises:
        SpecError: a lock or the manifest is wrong.
    """
    known = definition.manifest
    models = [known.pick(name) for name in definition.host.models] or list(known.models.values())
    return needs(definition.environment, models)
