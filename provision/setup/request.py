"""What a setup is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.host import HostSpec
    from provision.core import layout
    from provision.host.provider import ResolvedRoot


@dataclass(frozen=True)
class SetupRequest:
    """What a run is asked for: the person's spec, and where things are.

    `envs` is the folder of environments, models and variants; `retry` looks again for a silent hub.
    `rechoose`: choose mirrors also where a choice stands; `nodefaults`: without conda's default channels.
    """

    chosen: ResolvedRoot
    host: HostSpec
    envs: Path
    home: Path
    offline: bool
    retry: bool
    rechoose: bool = False
    nodefaults: bool | None = None

    @property
    def root(self) -> layout.Root:
        """The persistent folder."""
        return self.chosen.root
