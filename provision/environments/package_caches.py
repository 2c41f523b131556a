"""Selects the folders of the package caches of uv and conda: in the root, or on a local disk.

The caches are on a local disk if the root's file system lacks a feature that they need.
"""

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
    """Hold the folders of the two package caches.

    `uv`, `conda`: the folders.
    `can_link`: files in an environment of the root can be hard links to files in the caches.
    `note`: a text for the user if the caches are not in the root, else None.
    """

    uv: Path
    conda: Path
    can_link: bool
    note: str | None = None


def of(root: Root) -> PackageCaches:
    """Return the package caches for a root, by the known features of the root's file system.

    uv and rattler lock their caches with flock only. uv makes a lock file with a rename that replaces no file
    (renameat2), or with a hard link. This was observed with uv 0.13 and py-rattler 0.28.
    """
    can = volume_capabilities.known(root)
    if can.flock is False:
        lack = "no flock"
    elif can.hardlink is False and can.exchange is False:
        lack = "neither hard links nor renameat2"
    else:
        return PackageCaches(root.cache / "uv", root.pkgs, can.hardlink is not False)
    folder = layout.tool_folder("packages")
    note = f"{root.path} has {lack}, which uv and conda need for their caches, so the caches are in {folder}"
    return PackageCaches(folder / "uv", folder / "conda", False, note)
