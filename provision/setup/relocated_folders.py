"""Checks the folder that `provision relocate` names before a run begins."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from provision.config.host import Folder
from provision.core.errors import SpecError
from provision.host import tool_caches
from provision.volume import absence

if TYPE_CHECKING:
    from provision.config.host import Relocated
    from provision.setup.host_plan import HostPlan


def require_present(plan: HostPlan, entry: Relocated) -> None:
    """Require that a folder of the user exists, in its place or on the volume. A cache may still be missing.

    While the volume is absent nothing is required, because its check has the better message.

    Raises:
        SpecError: the folder does not exist, as after a typing error.
    """
    root = plan.root
    if not isinstance(entry, Folder) or (not root.marker.is_file() and absence.sign(root, plan.home, [])):
        return
    (folder,) = tool_caches.places([entry], root, os.environ, plan.home, [])[tool_caches.entry_label(entry)]
    if not os.path.lexists(folder.source) and not folder.target.is_dir():
        names = ", ".join((*tool_caches.NAMES, "conda"))
        raise SpecError(
            f"{folder.source} does not exist, so it cannot be relocated. Name a folder that exists, or a cache: {names}"
        )
