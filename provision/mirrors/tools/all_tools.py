"""Lists all tools, in the order in which they are shown and probed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from provision.mirrors.tools.conda import Conda
from provision.mirrors.tools.hf import Hf
from provision.mirrors.tools.pip import Pip
from provision.mirrors.tools.torch import Torch

if TYPE_CHECKING:
    from provision.mirrors.tools.tool import Tool
    from provision.volume.variables import VariableGroup

TOOLS: tuple[Tool, ...] = (
    Pip(),
    Conda(),
    Torch(),
    Hf(),
)


def names() -> list[str]:
    """Return the names of all tools: pip, conda, torch, hf."""
    return [tool.name for tool in TOOLS]


def by_name(name: str) -> Tool:
    """Return the tool with this name, which must be one of `names`."""
    return next(tool for tool in TOOLS if tool.name == name)


def variable_groups() -> list[VariableGroup]:
    """Return the groups of environment variables that firstlight sets for all tools."""
    return [group for tool in TOOLS for group in tool.variable_groups]
