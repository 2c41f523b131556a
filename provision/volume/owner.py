"""The owner of a record on a volume that several hosts may share: a host and a home folder."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, order=True)
class Owner:
    """Identify who made a record: the host's name (`uname -n`) and the path of the home folder.

    A record of an older version may lack one of them; its owner is unknown (None in place of an Owner).
    """

    host: str
    home: str

    def __str__(self) -> str:
        """Return the owner as HOST:HOME, the form that --adopt takes."""
        return f"{self.host}:{self.home}"


def current(home: Path) -> Owner:
    """Return the owner that this run is: this host, with this home folder."""
    return Owner(platform.node(), str(home))
