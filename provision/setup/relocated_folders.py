"""Checks the folder that `provision relocate` names before a run begins."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from provision.config.host import Folder
from provision.core.errors import SpecError
from provision.host import tool_caches
from provision.volume import absence, links
from provision.volume.owner import current

if TYPE_CHECKING:
    from provision.config.host import Relocated
    from provision.setup.host_plan import HostPlan


def require_present(plan: HostPlan, entry: Relocated, *, is_target_named: bool = True) -> None:
    """Check that a folder of the user exists, at its old path or on the volume; the folder of a tool may be missing.

    Without a mounted volume nothing is checked here, because the step "volume" reports that with a better message.

    Args:
        plan: the host plan.
        entry: the folder to relocate.
        is_target_named: the user passed --to, so an existing folder of another owner on the volume is accepted.

    Raises:
        SpecError: the folder does not exist, as after a typing error; or the default target has the folder of another
            owner.
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
    if is_target_named:
        return
    inside = os.path.relpath(folder.target, root.path).replace(os.sep, "/")
    owners = {row.owner for row in links.read(root).rows if row.target == inside}
    others = sorted(str(owner) for owner in owners if owner is not None)
    if not others or owners & {None, *links.own_owners(root, current(plan.home))}:
        return
    source = shlex.quote(str(folder.source))
    command = f"provision relocate {source} --to {shlex.quote(inside)}"
    if not os.path.lexists(folder.source):
        raise SpecError(
            f"{folder.source} does not exist, and {folder.target} was relocated by {others[0]}. To use that folder "
            f"here too, name its path: {command}"
        )
    own = shlex.quote(f"{inside}-of-{current(plan.home).host}")
    raise SpecError(
        f"{folder.target} was relocated by {others[0]}. To keep {folder.source} apart from it, name another path: "
        f"provision relocate {source} --to {own}; to merge both: {command}"
    )
