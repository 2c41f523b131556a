"""Reads the catalogue of mirrors: envs/mirrors.toml, and a file of the same form with the user's own mirrors."""

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
    """Hold the mirrors: {name of the tool: {name of the mirror: mirror}}.

    If two mirrors are equally good, the earlier one in this order is chosen.
    """

    mirrors: Mapping[str, Mapping[str, Mirror]] = field(default_factory=dict)

    def of(self, tool: str) -> Mapping[str, Mirror]:
        """Return {name: mirror} for one tool, without the mirrors whose `enabled` is false."""
        return {name: mirror for name, mirror in self.mirrors.get(tool, {}).items() if mirror.enabled}

    def names(self) -> list[str]:
        """Return the names of all enabled mirrors, each once."""
        return list(dict.fromkeys(name for tool in all_tools.names() for name in self.of(tool)))

    def tools_of(self, name: str) -> list[str]:
        """Return the names of the tools for which the catalogue has a mirror with this name."""
        return [tool for tool in all_tools.names() if name in self.of(tool)]


def load(shipped: Path, added: str | None = None) -> Catalogue:
    """Return the catalogue from the file of firstlight and the user's own file.

    If both files have a mirror of a tool with the same name, the user's entry is used.

    Args:
        shipped: the path of envs/mirrors.toml; the file may be missing.
        added: the path of the user's file, which has the same form and may begin with ~; None without one.

    Raises:
        SpecError: a file cannot be read, has an invalid key or URL, or has a mirror with a reserved name.
    """
    from pathlib import Path

    first = _read(shipped) if shipped.exists() else {}
    if added is None:
        return Catalogue(first)
    # Without a home folder, expanduser returns the path unchanged. Then an error reports that the file does not exist.
    user_mirrors = _read(Path(os.path.expanduser(added)))  # noqa: PTH111 (Path.expanduser raises there)
    return Catalogue({tool: {**first.get(tool, {}), **user_mirrors[tool]} for tool in all_tools.names()})


def _read(path: Path) -> dict[str, dict[str, Mirror]]:
    """Return {tool: {name: mirror}} of one file; a tool without mirrors in the file has an empty table."""
    # The pydantic model has one table for each tool, with rows of the tool's `mirror_model`.
    tables: dict[str, Any] = {
        tool.name: (GenericAlias(dict, (str, tool.mirror_model)), Field(default_factory=dict))
        for tool in all_tools.TOOLS
    }
    content = toml.load(path, create_model("CatalogueFile", __base__=toml.Strict, **tables))
    mirrors: dict[str, dict[str, Mirror]] = {tool: getattr(content, tool) for tool in all_tools.names()}
    for tool, rows in mirrors.items():
        for name in rows:
            if name in {OFFICIAL, "auto", "keep"}:
                raise SpecError(f"{path}, key {tool}.{name}: {name!r} is a reserved name. Rename the mirror.")
    return mirrors
