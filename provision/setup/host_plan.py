"""Resolves one host: its spec, its root, the machine, and the files under envs/ that the spec names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.config import host as host_config
from provision.core import layout
from provision.core.errors import SpecError
from provision.host import provider

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.config.host import HostSpec, Relocated
    from provision.environments.definition import EnvironmentDefinition
    from provision.host.facts import HostFacts
    from provision.host.provider import ResolvedRoot
    from provision.mirrors.catalogue import Catalogue
    from provision.models.manifest import Manifest


@dataclass(frozen=True)
class HostDefinition:
    """What a host should have: its spec, and the files under `envs` that the spec names.

    Each file is read when it is first needed, and once; a command that does not need one does not fail over it.
    """

    host: HostSpec
    envs: Path

    @cached_property
    def machine(self) -> HostFacts:
        """The facts of this machine."""
        from provision.host import facts

        return facts.probe()

    @cached_property
    def environment(self) -> EnvironmentDefinition:
        """The environment of the host.

        Raises:
            SpecError: there is no such environment, it is not locked, no variant fits, or it mixes conda and pip.
        """
        from provision.environments import definition

        return definition.resolve(self.envs, self.host, self.machine)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The shipped mirrors, and those that the user adds.

        Raises:
            SpecError: a catalogue is wrong.
        """
        from provision.mirrors import catalogue

        return catalogue.load(self.envs / "mirrors.toml", self.host.catalogue)

    @cached_property
    def manifest(self) -> Manifest:
        """The shipped models, and those that the user adds.

        Raises:
            SpecError: a manifest is wrong.
        """
        from provision.models import manifest

        return manifest.load(self.envs / "models.toml", self.host.manifest)


@dataclass(frozen=True)
class HostPlan:
    """One run's view of a host: its definition, its root, and how the run is to go about it.

    `retry`: try again a hub that did not answer an earlier run. `mirror`: the mirrors of each tool, in place of
    host.toml's. `rechoose`: choose mirrors also where a choice is on record. `nodefaults`: leave conda's default
    channels out; None: as on record.
    """

    definition: HostDefinition
    chosen: ResolvedRoot
    home: Path
    offline: bool
    retry: bool
    mirror: str | Mapping[Any, str]
    rechoose: bool = False
    nodefaults: bool | None = None

    @property
    def root(self) -> layout.Root:
        """The persistent folder."""
        return self.chosen.root

    @property
    def host(self) -> HostSpec:
        """The content of host.toml, as the flags change it."""
        return self.definition.host

    def with_mirrors(self, mirror: Mapping[str, str], *, nodefaults: bool) -> HostPlan:
        """Return this plan with other mirrors, to be chosen anew; it shares what has been read."""
        return replace(self, mirror=mirror, rechoose=True, nodefaults=nodefaults)

    def with_relocated(self, folder: Relocated) -> HostPlan:
        """Return this plan with one more relocated folder, each once; it shares what has been read.

        Raises:
            SpecError: no root is named.
        """
        if not self.chosen.named:
            raise SpecError("there is no folder that survives to move it to: name one with --root DIR.")
        others = [other for other in self.chosen.relocate if other != folder]
        return replace(self, chosen=replace(self.chosen, relocate=[*others, folder]))


def resolve(
    root: str | None,
    host: Path | None,
    envs: Path | None,
    *,
    offline: bool = False,
    retry: bool = False,
    changes: Mapping[str, object] | None = None,
) -> HostPlan:
    """Resolve a run's host from the flags of the command and host.toml.

    Args:
        root: the flag, which beats host.toml.
        host: the file that takes host.toml's place.
        envs: the folder that takes the shipped envs/ folder's place.
        offline: use no network.
        retry: try again a hub that did not answer an earlier run.
        changes: {key of host.toml: the value of a flag, or None where it is not given}.

    Raises:
        SpecError: host.toml or a provider profile is wrong, or the environment's name is none.
    """
    spec = host_config.load_host(host)
    folder = layout.envs_folder(envs)
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    name = str(given.get("env") or spec.env)
    if not re.fullmatch(host_config.NAME, name):
        raise SpecError(f"{name!r} is no name of an environment.")
    chosen = provider.choose(root, spec, folder, os.environ, Path.home())
    changed = spec.model_copy(update=given)
    return HostPlan(HostDefinition(changed, folder), chosen, Path.home(), offline, retry, changed.mirror)
