"""Selects the folders of uv's and conda's package caches: on the root, or in the home where they cannot work there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core import layout
from provision.volume import volume_capabilities

if TYPE_CHECKING:
    from pathlib import Path

    from provision.core.layout import Root


@dataclass(frozen=True)
class PackageCaches:
    """Name the two caches. `can_link`: hard links from them into an environment of the root may work.

    `note` is a text for the user if the caches are not on the root.
    """

    uv: Path
    conda: Path
    can_link: bool
    note: str | None = None


def of(root: Root) -> PackageCaches:
    """Return the caches of a root, by the known features of its file system.

    uv and rattler lock their caches with flock, and have no other lock. uv makes a lock file by a rename that replaces
    nothing, or by a hard link (seen with uv 0.13 and py-rattler 0.28).
    """
    can = volume_capabilities.known(root)
    if can.flock is False:
        lack = "no flock"
    elif can.hardlink is False and can.exchange is False:
        lack = "neither hard links nor renameat2"
    else:
        return PackageCaches(root.cache / "uv", root.pkgs, can.hardlink is not False)
    folder = layout.tool_folder("packages")
    note = f"{root.path} has {lack}, which uv and conda need for their caches: these are in {folder}"
    return PackageCaches(folder / "uv", folder / "conda", False, note)
