"""Determines which hub cache is in use and by which rule, and whether programs of this shell and other shells find it.

A hub cache is the folder in which huggingface_hub stores models. "The volume's hub" is the hub cache in the root.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.client_folders import client_folders, default_hub
from provision.core.errors import BlockedError
from provision.core.step import Check, State
from provision.volume import variables

if TYPE_CHECKING:
    from provision.core.layout import Root


@dataclass(frozen=True)
class HubInUse:
    """Describe the hub cache in use.

    `path`: its folder.
    `source`: the environment variable or the rule that selects it, as text.
    `problem`: the programs that do not find the hub cache, and two ways to correct that, as text; None without one.
    `is_found`: programs of this shell find it, in each working folder.
    """

    path: Path
    source: str
    problem: str | None = None
    is_found: bool = True

    @property
    def line(self) -> str:
        """Return the line for the user: the folder and the rule that selects it, without the problem."""
        return f"hub in use: {self.path} (from {self.source})"

    def to_dict(self) -> dict[str, object]:
        """Return {"path", "from", "problem", "is_found"} for JSON output."""
        return {"path": str(self.path), "from": self.source, "problem": self.problem, "is_found": self.is_found}


def of(root: Root) -> HubInUse:
    """Return the hub cache that is in use in this process."""
    home = Path.home()
    folders = client_folders(os.environ, home)
    path = root.hub_in_use
    source = folders.variable or "the default of the home"
    if folders.is_relative and folders.variable is not None:
        given = f"{folders.variable}={shlex.quote(os.environ[folders.variable])}"
        problem = (
            f"{given} is a relative path, so each working folder has a hub of its own. Set an absolute path: "
            f"`export {folders.variable}={shlex.quote(str(_value(folders.variable, folders.hub)))}`, or use the "
            f"default: `unset {folders.variable}`"
        )
        return HubInUse(path, source, problem, is_found=False)
    if path == root.hub:
        return _on_volume(root, folders.hub, source)
    if folders.variable is None or not root.hub.is_dir():
        return HubInUse(path, source)
    problem = (
        f"{folders.variable} is set in this shell, and the volume has a hub of its own: {root.hub}. Shells without "
        f"this variable use {default_hub(home)}. To use the volume's hub in this shell: `unset {folders.variable}`, or "
        f"`export HF_HUB_CACHE={shlex.quote(str(root.hub))}`. To use this hub everywhere, add to the login file of the "
        f"other shells: `export HF_HUB_CACHE={shlex.quote(str(folders.hub))}`"
    )
    return HubInUse(path, source, problem)


def _on_volume(root: Root, client_hub: Path, source: str) -> HubInUse:
    """Return the description if the volume's hub is in use; it has a problem if huggingface_hub uses another folder.

    Args:
        root: the root.
        client_hub: the hub cache that huggingface_hub uses in this shell.
        source: the variable or rule that selects `client_hub`.
    """
    if layout.is_same_place(client_hub, root.hub):
        link = "" if client_hub == root.hub else f", {client_hub} leads to it"
        return HubInUse(root.hub, f"{source}{link}")
    command = f"{layout.program()} shellenv --root {shlex.quote(str(root.path))}"
    is_variable_recorded = layout.is_same_place(Path(variables.read(root).get("HF_HUB_CACHE", "/")), root.hub)
    by_variable = (
        f'eval "$({command})"' if is_variable_recorded else f"export HF_HUB_CACHE={shlex.quote(str(root.hub))}"
    )
    problem = (
        f"{client_hub} does not lead to the volume's hub {root.hub}, so programs of this shell do not find its models. "
        f"Link it: `{layout.program()} relocate huggingface --root {shlex.quote(str(root.path))}`, or set the variable "
        f"in each shell: `{by_variable}`"
    )
    return HubInUse(root.hub, "the volume", problem, is_found=is_variable_recorded)


def _value(variable: str, hub: Path) -> Path:
    """Return the value of the environment variable with which huggingface_hub uses this hub cache."""
    return {"HF_HOME": hub.parent, "XDG_CACHE_HOME": hub.parent.parent}.get(variable, hub)


class HubStep:
    """Checks that programs of this shell find the hub cache in use."""

    name = "hub in use"
    essential = False
    local = True

    def __init__(self, root: Root) -> None:
        """Store the root."""
        self.root = root

    def describe(self) -> str:
        """Return the text of this step in the plan: the hub cache in use."""
        return of(self.root).line

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (the check has one depth)
        """Check whether programs of this shell find the hub cache in use.

        If they do not, the state is drifted: the relocation of huggingface, an earlier step, makes the missing link.
        """
        hub = of(self.root)
        detail = f"{hub.path} (from {hub.source})"
        if hub.is_found:
            return Check(State.OK, detail, hub.problem)
        return Check(State.DRIFTED, str(hub.problem))

    def apply(self) -> None:
        """Raise an error with the problem, since only the user or an earlier step can correct it.

        Raises:
            BlockedError: always; programs of this shell do not find the hub cache in use.
        """
        raise BlockedError(str(of(self.root).problem))
