"""Builds the list of setup steps of a host, in their order."""

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
from provision.mirrors import chosen_mirrors, selection, write_config
from provision.mirrors.probe_needs import ProbeNeeds
from provision.models import load_line, pins, stand_ins
from provision.models.hub_in_use import HubStep
from provision.models.hubs import Hubs
from provision.models.snapshots import SnapshotStep
from provision.models.step import ModelStep
from provision.relocation.login_step import LoginStep
from provision.relocation.record_step import LinksByHand, RecordStep
from provision.relocation.step import Claim, RelocateStep
from provision.volume import adoption as adoptions
from provision.volume import links, marker
from provision.volume.adoption import Adoption
from provision.volume.marker import VolumeStep
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from provision.config.models import ModelSpec
    from provision.core.progress import Progress
    from provision.core.step import Step
    from provision.environments.definition import EnvironmentDefinition
    from provision.lockfiles.conda_lock import CondaPackage
    from provision.setup.host_plan import HostDefinition, HostPlan
    from provision.volume.journal import Journal


def probe_needs(environment: EnvironmentDefinition, models: Iterable[ModelSpec]) -> ProbeNeeds:
    """Return the locked files of an environment and of models; a mirror is probed for these files.

    Raises:
        SpecError: a lock file cannot be read.
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
    emit: Callable[[str], None] = lambda _: None,
    *,
    for_environment: bool = True,
) -> list[Step]:
    """Return the steps of setup for a host, in their order.

    Args:
        plan: the host plan.
        journal: the journal of this run.
        progress: receives the progress of the current step.
        emit: receives a line for the user when a step waits, or starts other work that takes long.
        for_environment: the run builds the environment, so a new root must lie on a file system on which it works.

    Raises:
        SpecError: host.toml names an environment, variant or model that does not exist, or folders to relocate are
            nested or overlap with the root.
    """
    root, host, envs = plan.root, plan.host, plan.definition.envs
    environment, manifest = plan.definition.environment, plan.definition.manifest
    models = {manifest.name(name): manifest.pick(name) for name in host.models}
    hubs = Hubs(root, os.environ, offline=plan.offline)
    bases = activation.conda_bases(os.environ, plan.home)
    conda = activation.CondaLinkStep(root.prefix(host.env), plan.home, bases, journal)
    named = activation.conda_folders(os.environ, plan.home) if "conda" in plan.chosen.relocate else []
    places = tool_caches.places(plan.chosen.relocate, root, os.environ, plan.home, bases, named)
    sources = [place.source for group in places.values() for place in group]
    adoption = _adoption(plan)
    moved = _relocations(plan, places, {*sources, conda.link}, adoption, journal, progress)
    has_conda_link = conda.is_recorded(root) or (bases and environment.conda_lock is not None)
    link_paths = [*sources, *tool_caches.link_paths(os.environ, plan.home)]
    warning = plan.chosen.warning
    volume = VolumeStep(root, link_paths, journal, warning, plan.home, for_environment=for_environment)
    built: list[Step] = [volume, *moved]
    mirrors, settings = _mirror_steps(plan, journal, conda_is_here=bool(bases))
    built += mirrors
    built.append(EnvStep(root, environment, plan.home, journal, offline=plan.offline, progress=progress, tell=emit))
    built += settings
    if has_conda_link:
        built.append(conda)
    by_hand = LinksByHand(link_paths, root, plan.home)
    if moved or has_conda_link or root.links.exists() or any(by_hand.linked()):
        built.append(RecordStep(root, plan.home, [*moved, conda, by_hand], journal, adoption))
    login = LoginStep(root, plan.home, os.environ, journal, wanted=host.login)
    if host.login or login.check().state is not State.OK:
        built.append(login)
    if host.models or "huggingface" in places:
        built.append(HubStep(root))
        built.append(SnapshotStep(root, [pins.apply(root, model) for model in manifest.with_all_extras()], journal))
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
            tell=emit,
            pinned=manifest.revisions(model.repo),
            architecture=load_line.architecture_of(envs, model),
        )
        for name, model in models.items()
    ]
    if environment.variants[0].torch:
        built.append(SmokeStep(root, host.env))
    return built


def _adoption(plan: HostPlan) -> Adoption:
    """Return the adoption that the plan names; else one without an owner, with a note about owners to adopt from."""
    owner = current(plan.home)
    if plan.adopt is None:
        return Adoption(note=adoptions.offer(plan.root, owner))
    marker.require(plan.root)
    return Adoption(adoptions.resolve(plan.root, plan.adopt, owner))


def _relocations(
    plan: HostPlan,
    places: Mapping[str, list[tool_caches.RelocatedFolder]],
    others: Collection[Path],
    adoption: Adoption,
    journal: Journal,
    progress: Progress,
) -> list[RelocateStep]:
    """Return the steps of relocated folders: recorded links first, since a requested folder may lie below such a link.

    Args:
        plan: the host plan.
        places: {label: folders} of the requested folders.
        others: the paths of links that other steps make.
        adoption: the owner whose links this home takes over.
        journal: the journal of this run.
        progress: receives the progress of copies.
    """
    root, home = plan.root, plan.home
    recorded = adoption.with_links(root, current(home))
    own = [link for link in recorded if link.path not in others]
    paths = {*others, *(link.path for link in own)}
    unknown = [link for link in links.of_unknown_owner(root, home) if link.path not in paths]
    listed = {tool_caches.entry_label(entry) for entry in plan.listed}
    groups: list[tuple[str, list[tool_caches.RelocatedFolder], Claim]] = [
        ("what is on record", [tool_caches.RelocatedFolder(link.path, link.target) for link in own], Claim.RECORDED),
        (
            "of an older record",
            [tool_caches.RelocatedFolder(link.path, link.target) for link in unknown],
            Claim.UNKNOWN,
        ),
    ]
    groups = [group for group in groups if group[1]]
    groups += [(name, group, Claim.LISTED if name in listed else Claim.DEFAULT) for name, group in places.items()]
    return [
        RelocateStep(name, group, root, home, journal, progress, claim=claim, recorded=recorded)
        for name, group, claim in groups
    ]


def _mirror_steps(plan: HostPlan, journal: Journal, *, conda_is_here: bool) -> tuple[list[Step], list[Step]]:
    """Return the step that selects the mirrors, and the step that writes the settings files for them."""
    root, catalogue = plan.root, plan.definition.catalogue
    mirrors = selection.requested_mirrors(_by_tool(plan.mirror), catalogue)
    has_record = chosen_mirrors.read(root) is not None
    must_select = plan.rechoose or (catalogue.names() and set(mirrors.values()) != {"keep"})
    selector = selection.MirrorStep(
        root,
        mirrors,
        catalogue,
        lambda: host_probe_needs(plan.definition),
        os.environ,
        plan.home,
        journal,
        offline=plan.offline,
        again=plan.rechoose,
        nodefaults=plan.nodefaults,
    )
    prefix = root.prefix(plan.host.env)
    writer = write_config.SettingsStep(root, prefix, plan.home, os.environ, journal, conda_is_here=conda_is_here)
    return [selector] if must_select else [], [writer] if must_select or has_record else []


def _by_tool(mirror: str | Mapping[Any, str]) -> str | dict[str, str]:
    return mirror if isinstance(mirror, str) else {str(tool): name for tool, name in mirror.items()}


def host_probe_needs(definition: HostDefinition) -> ProbeNeeds:
    """Return the locked files for which the mirrors of a host are probed.

    They are the files of the host's environment and models; without models in host.toml, of all models of the manifest.

    Raises:
        SpecError: a lock file or the manifest is not valid.
    """
    manifest = definition.manifest
    models = [manifest.pick(name) for name in definition.host.models] or list(manifest.models.values())
    return probe_needs(definition.environment, models)
