"""Builds the host plan of a run: the host definition, the root, and the options of the run."""

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
    """Hold the host definition: the content of host.toml, and the files in the `envs` folder that host.toml names.

    Each file is read at its first use, and only once. So an error in a file does not stop a command that does not need
    the file.
    """

    host: HostSpec
    envs: Path

    @cached_property
    def machine(self) -> HostFacts:
        """Return the hardware and driver of this machine; they are read at the first use."""
        from provision.host import facts

        return facts.probe()

    @cached_property
    def environment(self) -> EnvironmentDefinition:
        """Return the definition of the host's environment.

        Raises:
            SpecError: the environment does not exist, has no lock, has no fitting variant, or mixes conda and pip.
        """
        from provision.environments import definition

        return definition.resolve(self.envs, self.host, self.machine)

    @cached_property
    def catalogue(self) -> Catalogue:
        """Return the catalogue of mirrors: the shipped mirrors, and those of the user's own catalogue file.

        Raises:
            SpecError: a catalogue is not valid.
        """
        from provision.mirrors import catalogue

        return catalogue.load(self.envs / "mirrors.toml", self.host.catalogue)

    @cached_property
    def manifest(self) -> Manifest:
        """Return the manifest of models: the shipped models, and those of the user's own manifest file.

        Raises:
            SpecError: a manifest is not valid.
        """
        from provision.models import manifest

        return manifest.load(self.envs / "models.toml", self.host.manifest)


@dataclass(frozen=True)
class HostPlan:
    """Hold the definition of a host, its root, and the options of one run.

    `offline`: use no network. `retry`: contact a hub again that did not answer an earlier run. `mirror`: {tool:
    mirror}, in place of the mirrors in host.toml. `rechoose`: select mirrors again although a selection is recorded.
    `nodefaults`: leave out conda's default channels; None keeps the recorded value. `relocated`: the folder that the
    command `relocate` names. `adopt`: the owner whose recorded links this home takes over, in the form of --adopt.
    """

    definition: HostDefinition
    chosen: ResolvedRoot
    home: Path
    offline: bool
    retry: bool
    mirror: str | Mapping[Any, str]
    rechoose: bool = False
    nodefaults: bool | None = None
    relocated: Relocated | None = None
    adopt: str | None = None

    @property
    def root(self) -> layout.Root:
        """Return the root of this run."""
        return self.chosen.root

    @property
    def host(self) -> HostSpec:
        """Return the content of host.toml; the values of flags replace those of the file."""
        return self.definition.host

    @property
    def listed(self) -> list[Relocated]:
        """Return the folders to relocate that host.toml or the command names, not those of a profile or the default."""
        return [*(self.host.relocate or []), *([self.relocated] if self.relocated is not None else [])]

    def with_mirrors(self, mirror: Mapping[str, str], *, nodefaults: bool) -> HostPlan:
        """Return this plan with other mirrors. Setup then ignores the recorded choice, and selects every mirror again.

        Args:
            mirror: {tool: name of its mirror, "auto", "keep" or "official"}.
            nodefaults: leave conda's channel `defaults` out of conda's settings.
        """
        return replace(self, mirror=mirror, rechoose=True, nodefaults=nodefaults)

    def with_adopted(self, owner: str | None) -> HostPlan:
        """Return this plan with the owner whose links this home takes over, as "HOST:HOME", "HOST" or ":HOME"."""
        return replace(self, adopt=owner)

    def with_relocated(self, folder: Relocated) -> HostPlan:
        """Return this plan with one more folder to relocate, unless the plan lists the folder already.

        Raises:
            SpecError: no flag, file, link or profile names a root.
        """
        if not self.chosen.named:
            raise SpecError(
                "no root is named, and the default root may be wiped with the home. Name a root: --root DIR"
            )
        others = [other for other in self.chosen.relocate if other != folder]
        return replace(self, chosen=replace(self.chosen, relocate=[*others, folder]), relocated=folder)


def resolve(
    root: str | None,
    host: Path | None,
    envs: Path | None,
    *,
    offline: bool = False,
    retry: bool = False,
    trust: bool | None = False,
    changes: Mapping[str, object] | None = None,
) -> HostPlan:
    """Return the host plan of a run, from the flags of the command and from host.toml.

    Args:
        root: the value of --root, which has precedence over host.toml; None without the flag.
        host: the file to read in place of host.toml in the working folder, or None.
        envs: the folder to use in place of the shipped `envs` folder, or None.
        offline: use no network.
        retry: contact a hub again that did not answer an earlier run.
        trust: True trusts every user who can write to the root; None leaves the check of the root to the caller.
        changes: {key of host.toml: value of the flag that replaces it, or None without the flag}.

    Raises:
        BlockedError: another user can change the records of the root (see `provider.require_trust`).
        SpecError: host.toml, a provider profile or the name of the environment is not valid.
    """
    spec = host_config.load_host(host)
    folder = layout.envs_folder(envs)
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    name = str(given.get("env") or spec.env)
    if not re.fullmatch(host_config.NAME, name):
        raise SpecError(
            f"{name!r} is no name of an environment. Use letters, digits, '.', '_' and '-', with no leading sign."
        )
    chosen = provider.choose(root, spec, folder, os.environ, Path.home())
    if trust is not None:
        provider.require_trust(chosen, spec, os.environ, is_trusted=trust)
    changed = spec.model_copy(update=given)
    return HostPlan(HostDefinition(changed, folder), chosen, Path.home(), offline, retry, changed.mirror)
