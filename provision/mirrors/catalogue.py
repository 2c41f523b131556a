"""The catalogue of mirrors: envs/mirrors.toml, and a file of the same form with the user's own mirrors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from types import GenericAlias
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from provision.config import toml
from provision.core.errors import SpecError
from provision.mirrors.chosen_mirrors import OFFICIAL
from provision.mirrors.tools import all_tools

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from provision.mirrors.mirror import Mirror


@dataclass(frozen=True)
class Catalogue:
    """Hold the mirrors as {tool: {name: mirror}}. Between equally good mirrors, the first one is chosen."""

    mirrors: Mapping[str, Mapping[str, Mirror]] = field(default_factory=dict)

    def of(self, tool: str) -> Mapping[str, Mirror]:
        """Return {name: mirror} for one tool, without mirrors whose `enabled` is false."""
        return {name: mirror for name, mirror in self.mirrors.get(tool, {}).items() if mirror.enabled}

    def names(self) -> list[str]:
        """Return the names of all mirrors, without duplicates."""
        return list(dict.fromkeys(name for tool in all_tools.names() for name in self.of(tool)))

    def tools_of(self, name: str) -> list[str]:
        """Return the names of the tools that a mirror serves."""
        return [tool for tool in all_tools.names() if name in self.of(tool)]


def load(shipped: Path, added: str | None = None) -> Catalogue:
    """Load the shipped catalogue and the user's; a user's entry replaces the shipped entry of the same name.

    Args:
        shipped: path of envs/mirrors.toml; the file may be absent.
        added: path of the user's catalogue, which has the same form.

    Raises:
        SpecError: a file cannot be read, a key or address in it is wrong, or a mirror has a reserved name.
    """
    from pathlib import Path

    first = _read(shipped) if shipped.exists() else {}
    if added is None:
        return Catalogue(first)
    # Without a home folder, expanduser returns the path unchanged; the file is then reported as not found.
    user_mirrors = _read(Path(os.path.expanduser(added)))  # noqa: PTH111 (Path.expanduser raises there)
    return Catalogue({tool: {**first.get(tool, {}), **user_mirrors[tool]} for tool in all_tools.names()})


def _read(path: Path) -> dict[str, dict[str, Mirror]]:
    """Return {tool: {name: mirror}} of one file; a tool without mirrors in the file has an empty table."""
    # The pydantic model is built from the list of tools: one table for each, with rows of the tool's `mirror_model`.
    tables: dict[str, Any] = {
        tool.name: (GenericAlias(dict, (str, tool.mirror_model)), Field(default_factory=dict))
        for tool in all_tools.TOOLS
    }
    content = toml.load(path, create_model("CatalogueFile", __base__=toml.Strict, **tables))
    mirrors: dict[str, dict[str, Mirror]] = {tool: getattr(content, tool) for tool in all_tools.names()}
    for tool, rows in mirrors.items():
        for name in rows:
            if name in {OFFICIAL, "auto", "keep"}:
                raise SpecError(f"{path}, key {tool}.{name}: {name!r} is a reserved name. Give the mirror another one.")
    return mirrors
