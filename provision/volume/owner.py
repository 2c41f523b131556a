"""Defines the owner of records on a volume that several hosts may share: a host name and a home folder."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, order=True)
class Owner:
    """Identify the owner of a recorded link or run: the host name (`uname -n`) and the path of the home folder.

    If a record of an older version does not have both, its owner is unknown: None instead of an Owner.
    """

    host: str
    home: str

    def __str__(self) -> str:
        """Return the owner as "HOST:HOME", the form of the value of --adopt."""
        return f"{self.host}:{self.home}"


def current(home: Path) -> Owner:
    """Return the owner of this run: the name of this host, with the home folder `home`."""
    return Owner(platform.node(), str(home))
