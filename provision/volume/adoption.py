"""Adopts the links of another owner, for a host that was rented again under another host name."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import SpecError
from provision.volume import links

if TYPE_CHECKING:
    from provision.core.layout import Root
    from provision.volume.owner import Owner

_SHOWN = 4  # the most owners that a message lists


@dataclass(frozen=True)
class Adoption:
    """Describe the adoption in this run: `owner` is the owner whose links are adopted, or None.

    `note` is a text for the user about owners whose links could be adopted, or None.
    """

    owner: Owner | None = None
    note: str | None = None

    def with_links(self, root: Root, owner: Owner) -> list[links.Link]:
        """Return the recorded links of an owner and those that it adopts, sorted; for the same path, only its own."""
        own = links.recorded(root, owner)
        paths = {link.path for link in own}
        content = links.read(root)
        rows = content.of(self.owner) if self.owner is not None else []
        adopted = (row.link(root, Path(owner.home)) for row in rows)
        return sorted([*own, *(link for link in adopted if link.path not in paths)])


def candidates(root: Root, owner: Owner) -> list[Owner]:
    """Return the other owners with recorded links and the same home path; none if `owner` itself has recorded links.

    Raises:
        BlockedError: the record cannot be read.
    """
    content = links.read(root)
    if content.of(owner):
        return []
    return sorted({row.owner for row in content.rows if row.owner is not None and row.owner.home == owner.home})


def offer(root: Root, owner: Owner) -> str | None:
    """Return a note with the links that this home could adopt, and the command to do so; None if there are none."""
    owners = candidates(root, owner)
    if not owners:
        return None
    content = links.read(root)
    parts = []
    for other in owners[:_SHOWN]:
        paths = [row.path for row in content.of(other)]
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        parts.append(f"{other} ({', '.join(paths[:3])}{more}): {command(root, other)}")
    more = f"; and {len(owners) - _SHOWN} more" if len(owners) > _SHOWN else ""
    return f"{owner} has no links on record. It can take over those of {'; of '.join(parts)}{more}"


def command(root: Root, other: Owner) -> str:
    """Return the shell command that adopts the links of the owner `other`."""
    return shlex.join([layout.program(), "repair", "--root", str(root.path), "--adopt", str(other)])


def resolve(root: Root, text: str, owner: Owner) -> Owner | None:
    """Return the owner that the value of --adopt names.

    Args:
        root: the root with the record of links.
        text: the value: HOST:HOME, or HOST, or :HOME for any host. If several owners fit, and one of them has the home
            path of `owner`, that one is chosen.
        owner: the owner that adopts the links.

    Returns:
        The named owner; None if `owner` has adopted the links of the named owner already, or is itself the named one.

    Raises:
        SpecError: no owner in the record fits, or several fit; the message lists them.
        BlockedError: the record cannot be read.
    """
    content = links.read(root)
    owners = sorted({row.owner for row in content.rows if row.owner is not None} - {owner})
    fitting = [other for other in owners if _fits(text, other)]
    same_home = [other for other in fitting if other.home == owner.home]
    chosen = same_home if len(fitting) > 1 and len(same_home) == 1 else fitting
    if len(chosen) == 1:
        return chosen[0]
    if not chosen and any(
        _fits(text, other) for other in (owner, *(old for old, new in content.adopted if new == owner))
    ):
        return None
    fact = f"fits {len(chosen)} owners" if chosen else "owns no links"
    listed = ", ".join(map(str, chosen or owners)) or "none"
    raise SpecError(
        f"{text} {fact} on {root.path}. Owners of links there: {listed}. Name one owner: --adopt HOST:HOME",
        next_act=f"cat {root.links}",
    )


def _fits(text: str, other: Owner) -> bool:
    host, colon, home = text.partition(":")
    return host in {other.host, ""} and (not colon or home.rstrip("/") == other.home) and text != ""
