"""The catalogue of mirrors: envs/mirrors.toml, and what a user adds to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from provision.config import toml
from provision.core.errors import SpecError
from provision.net.urls import check_address

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TOOLS = ("pip", "conda", "torch", "hf")
OFFICIAL = "official"


def _address(url: str) -> str:
    try:
        check_address(url, "the address")
    except SpecError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return url


Address = Annotated[str, AfterValidator(_address)]


class Mirror(toml.Strict):
    """One mirror of one tool.

    `redirects`: it leads to other hosts by design. `reach`: from where alone it answers. `source`: who lists it.
    """

    url: Address
    redirects: bool = False
    reach: str | None = None
    enabled: bool = True
    source: str = ""
    note: str = ""


class CondaMirror(Mirror):
    """A channel lies at `url`/CHANNEL, unless it lies `elsewhere` or is one that the mirror `lacks`.

    `defaults` holds main, r and msys2, where the mirror has them.
    """

    defaults: Address | None = None
    elsewhere: dict[str, Address] = Field(default_factory=dict)
    lacks: list[str] = Field(default_factory=list)

    def channel(self, name: str) -> str | None:
        """Where a channel lies, without a trailing slash; None where the mirror does not have it."""
        if name in self.lacks:
            return None
        return f"{self.elsewhere.get(name, self.url).rstrip('/')}/{name}"


class TorchMirror(Mirror):
    """PyTorch's own wheels: `{variant}` stands for cpu, cu126, …; an index, or one page that links the files."""

    kind: Literal["index", "find-links"] = "index"

    def address(self, variant: str) -> str:
        """Its address for one build of torch."""
        return self.url.replace("{variant}", variant)


class Catalogue(toml.Strict):
    """The mirrors a tool, in the order that decides between equals."""

    pip: dict[str, Mirror] = Field(default_factory=dict)
    conda: dict[str, CondaMirror] = Field(default_factory=dict)
    torch: dict[str, TorchMirror] = Field(default_factory=dict)
    hf: dict[str, Mirror] = Field(default_factory=dict)

    def of(self, tool: str) -> Mapping[str, Mirror]:
        """The mirrors of one tool, those that are switched off left out."""
        every: Mapping[str, Mirror] = getattr(self, tool)
        return {name: mirror for name, mirror in every.items() if mirror.enabled}

    def names(self) -> list[str]:
        """Every mirror's name, once."""
        return list(dict.fromkeys(name for tool in TOOLS for name in self.of(tool)))

    def tools_of(self, name: str) -> list[str]:
        """The tools that a mirror serves."""
        return [tool for tool in TOOLS if name in self.of(tool)]


def load(shipped: Path, added: str | None = None) -> Catalogue:
    """The shipped catalogue with what a user adds: an entry of the same name takes the shipped one's place.

    Args:
        shipped: envs/mirrors.toml; may be absent.
        added: another file of the same form.

    Raises:
        SpecError: a file cannot be read, a key or address in it is wrong, or a name means something else.
    """
    from pathlib import Path

    first = _read(shipped) if shipped.exists() else Catalogue()
    if added is None:
        return first
    more = _read(Path(os.path.expanduser(added)))  # noqa: PTH111 (no home: it stays as it is, and is not found)
    merged = {tool: {**getattr(first, tool), **getattr(more, tool)} for tool in TOOLS}
    return Catalogue(**merged)


def _read(path: Path) -> Catalogue:
    found = toml.load(path, Catalogue)
    for tool in TOOLS:
        for name in getattr(found, tool):
            if name in {OFFICIAL, "auto", "keep"}:
                raise SpecError(f"{path}, key {tool}.{name}: {name!r} has a meaning of its own. Give another name.")
    return found
