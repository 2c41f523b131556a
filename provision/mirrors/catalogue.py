"""The catalogue of mirrors: envs/mirrors.toml, and what a user adds to it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from types import GenericAlias
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from provision.config import toml
from provision.core.errors import SpecError
from provision.mirrors.record import OFFICIAL
from provision.mirrors.tools import all_tools

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from provision.mirrors.mirror import Mirror


@dataclass(frozen=True)
class Catalogue:
    """Hold the mirrors of each tool, by the name of the tool, in the order that decides between equals."""

    mirrors: Mapping[str, Mapping[str, Mirror]] = field(default_factory=dict)

    def of(self, tool: str) -> Mapping[str, Mirror]:
        """Return the mirrors of one tool, without those that are switched off."""
        return {name: mirror for name, mirror in self.mirrors.get(tool, {}).items() if mirror.enabled}

    def names(self) -> list[str]:
        """Return the name of every mirror, once."""
        return list(dict.fromkeys(name for tool in all_tools.names() for name in self.of(tool)))

    def tools_of(self, name: str) -> list[str]:
        """Return the names of the tools that a mirror serves."""
        return [tool for tool in all_tools.names() if name in self.of(tool)]


def load(shipped: Path, added: str | None = None) -> Catalogue:
    """Load the shipped catalogue with what a user adds: an entry of the same name takes the shipped one's place.

    Args:
        shipped: envs/mirrors.toml; may be absent.
        added: another file of the same form.

    Raises:
        SpecError: a file cannot be read, a key or address in it is wrong, or a name means something else.
    """
    from pathlib import Path

    first = _read(shipped) if shipped.exists() else {}
    if added is None:
        return Catalogue(first)
    more = _read(Path(os.path.expanduser(added)))  # noqa: PTH111 (no home: it stays as it is, and is not found)
    return Catalogue({tool: {**first.get(tool, {}), **more[tool]} for tool in all_tools.names()})


def _read(path: Path) -> dict[str, dict[str, Mirror]]:
    """Read one file; every tool has a key, also where the file names no mirror of it."""
    # The model follows the list of tools: a table for each tool, whose rows have the form that the tool gives them.
    tables: dict[str, Any] = {
        tool.name: (GenericAlias(dict, (str, tool.mirror_model)), Field(default_factory=dict))
        for tool in all_tools.TOOLS
    }
    content = toml.load(path, create_model("CatalogueFile", __base__=toml.Strict, **tables))
    mirrors: dict[str, dict[str, Mirror]] = {tool: getattr(content, tool) for tool in all_tools.names()}
    for tool, rows in mirrors.items():
        for name in rows:
            if name in {OFFICIAL, "auto", "keep"}:
                raise SpecError(f"{path}, key {tool}.{name}: {name!r} has a meaning of its own. Give another name.")
    return mirrors
