"""Describes which hub cache is in use, by which rule, and whether programs of this shell and of others find it."""

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

    `source` names the variable or the rule that selects it. `problem` says which programs do not find it, and names
    two ways to correct that. `is_found`: programs of this shell find it, in each working folder.
    """

    path: Path
    source: str
    problem: str | None = None
    is_found: bool = True

    @property
    def line(self) -> str:
        """Return the line for people, without the problem."""
        return f"hub in use: {self.path} (from {self.source})"

    def to_dict(self) -> dict[str, object]:
        """Return the description as JSON types."""
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
            f"{given} is a relative path, so programs use another hub in each working folder. Set an absolute path: "
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
    """Return the volume's hub cache, with a problem where the client uses another folder."""
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
    """Return the value of a variable that selects this hub."""
    return {"HF_HOME": hub.parent, "XDG_CACHE_HOME": hub.parent.parent}.get(variable, hub)


class HubStep:
    """Checks that programs of this shell find the hub cache in use."""

    name = "hub in use"
    essential = False
    local = True

    def __init__(self, root: Root) -> None:
        """Take the root."""
        self.root = root

    def describe(self) -> str:
        """Return the line of the plan."""
        return of(self.root).line

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (the check has one depth)
        """Compare the client's folder with the hub cache in use; the relocation makes a link that is missing."""
        hub = of(self.root)
        detail = f"{hub.path} (from {hub.source})"
        if hub.is_found:
            return Check(State.OK, detail, hub.problem)
        return Check(State.DRIFTED, str(hub.problem))

    def apply(self) -> None:
        """Raise the problem, which only the user or an earlier step can correct.

        Raises:
            BlockedError: programs of this shell do not find the hub cache in use.
        """
        raise BlockedError(str(of(self.root).problem))
