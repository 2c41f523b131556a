"""Looks at the host and says, a line a thing, what it found, why, and the exact command where something is amiss."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError
from provision.fs import capabilities
from provision.fs.open_dir import link_target
from provision.host import tool_caches
from provision.relocation import preflight
from provision.volume import links
from provision.volume.marker import read_marker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from provision.host.facts import HostFacts
    from provision.setup.host_plan import HostPlan

_LONG_PREFIX = 80  # a script's first line may have 127 characters, and the environment's own path comes on top
_FEW_INODES = 200_000
_NEEDED_BYTES = 8 << 30


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, note, or bad; `fix` is the command that mends it."""

    state: str
    thing: str
    text: str
    fix: str | None = None

    def to_dict(self) -> dict[str, object]:
        """As plain JSON types."""
        return {"state": self.state, "thing": self.thing, "text": self.text, "fix": self.fix}


def examine(plan: HostPlan) -> list[Finding]:
    """Everything that a look at this host shows. The root is tried out in a folder of our own inside it."""
    return [*_profiles(plan), *_root(plan), *_links(plan), *_machine(plan.definition.machine)]


def _profiles(plan: HostPlan) -> Iterator[Finding]:
    matches = plan.chosen.candidates
    for match in matches:
        if match.root is not None:
            yield Finding("ok", f"profile {match.name}", f"{match.profile.title}: {match.reason}")
            yield Finding("note", "survives", f"{match.profile.persists} (source: {match.profile.source})")
            yield Finding("note", "is wiped", match.profile.wiped)
            yield from (Finding("note", "trap", trap) for trap in match.profile.traps)
        elif match.signs:
            signs = ", ".join(match.signs)
            yield Finding(
                "note", f"profile {match.name}", f"{match.profile.title}: {signs} is here, but {match.reason}"
            )
    if all(match.root is None for match in matches):
        names = ", ".join(match.name for match in matches if not match.signs and match.reason.startswith("no "))
        yield Finding("note", "profile", f"none matches; not here: {names}" if names else "none matches")
    yield Finding("ok", "root", f"{plan.root.path} ({plan.chosen.reason})")


def _root(plan: HostPlan) -> Iterator[Finding]:
    root = plan.root
    try:
        marker = read_marker(root)
    except BlockedError as error:
        yield Finding("bad", "volume", str(error), f"cat {root.marker}")
        return
    leading = [link for link in tool_caches.link_paths(os.environ, plan.home) if _leads_into(link, root.path)]
    if marker is not None:
        yield Finding("ok", "volume", f"marked {marker.get('created')}")
    elif leading:
        yield Finding(
            "bad", "volume", f"not mounted, yet {leading[0]} leads into it", f"mount it, then {_run('repair')}"
        )
    else:
        yield Finding("note", "volume", "not set up yet", _run("setup"))
    place = root.path
    while not place.exists():
        place = place.parent
    yield from _capabilities(place, plan.home)
    if len(str(root.path)) > _LONG_PREFIX:
        yield Finding("note", "path", f"{root.path} is long: scripts of an environment may not start from it")


def _capabilities(place: Path, home: Path) -> Iterator[Finding]:
    can = capabilities.probe(place, home)
    if not can.writable:
        yield Finding("bad", "folder", f"{place} cannot be written", "name another: --root DIR")
        return
    for name, value, needed in (
        ("symlink", can.symlink, "environments and the hub cache need them"),
        ("execute", can.execute, "an environment's programs start from it"),
        ("hardlink", can.hardlink, None),
        ("flock", can.flock, None),
    ):
        if value:
            yield Finding("ok", name, f"{place} can")
        elif needed:
            yield Finding("bad", name, f"{place} cannot: {needed}", "name another: --root DIR")
        else:
            yield Finding("note", name, f"{place} cannot: files are copied, and a lock is kept as a file")
    few = can.free_bytes < _NEEDED_BYTES
    yield Finding("note" if few else "ok", "free space", f"{can.free_bytes / 1e9:.1f} GB of {place}")
    if can.free_inodes is None:
        yield Finding("ok", "free inodes", "made as they are needed")
    else:
        scarce = can.free_inodes < _FEW_INODES
        yield Finding("note" if scarce else "ok", "free inodes", f"{can.free_inodes:,} of {place}")
    other = "the home's own" if can.same_as_home else "another than the home's"
    yield Finding("ok", "file system", f"{other}: a folder is {'renamed' if can.same_as_home else 'copied'} there")


def _links(plan: HostPlan) -> Iterator[Finding]:
    if not plan.root.links.exists():
        return
    recorded = links.recorded(plan.root, plan.home)
    wrong = [link for link in recorded if link_target(link.path) != str(link.target)]
    yield Finding("ok", "links", f"{len(recorded) - len(wrong)} of {len(recorded)} are right")
    for link in wrong:
        found = link_target(link.path)
        now = f"leads to {found}" if found else "is no link" if os.path.lexists(link.path) else "is not there"
        yield Finding("bad", "link", f"{link.path} {now}, it should lead to {link.target}", _run("repair"))
    for pid, program, path in preflight.processes_using([link.path for link in wrong if link.path.is_dir()]):
        yield Finding("note", "busy", f"pid {pid} ({program}) uses {path}")


def _machine(machine: HostFacts) -> Iterator[Finding]:
    cards = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    driver = f", driver {machine.nvidia_driver}" if machine.nvidia_driver else ""
    yield Finding(
        "ok", "machine", f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 1e9:.1f} GB, {cards}{driver}"
    )


def _leads_into(link: Path, folder: Path) -> bool:
    found = link_target(link)
    return found is not None and Path(found).is_relative_to(folder)


def _run(command: str) -> str:
    return f"{layout.program()} {command}"
