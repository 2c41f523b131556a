"""Examines the host and its root, and reports findings: each has a thing, a fact and, for a fault, a remedy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError
from provision.fs import capabilities
from provision.fs.open_dir import link_target
from provision.host import provider, tool_caches
from provision.models import hub_in_use
from provision.relocation import preflight
from provision.volume import absence, adoption, links, trust, volume_capabilities
from provision.volume.marker import read_marker
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from provision.fs.capabilities import Capabilities
    from provision.host.facts import HostFacts
    from provision.setup.host_plan import HostPlan

# Linux before 5.1 reads only 127 characters of a script's first line (man 2 execve). This line names the interpreter of
# an environment, whose path is longer than that of the root.
_LONG_PREFIX = 80
_NEEDED_INODES = 200_000
_NEEDED_BYTES = 8 << 30


@dataclass(frozen=True)
class Finding:
    """Describe one finding about `thing`: `state` is "ok", "note" or "bad", and `text` the fact.

    `fix` is the command or action that corrects it, or None.
    """

    state: str
    thing: str
    text: str
    fix: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the finding as a dict of JSON types with the keys state, thing, text and fix."""
        return {"state": self.state, "thing": self.thing, "text": self.text, "fix": self.fix}


def examine(plan: HostPlan) -> list[Finding]:
    """Return the findings about this host.

    The file system of the root is tested in a temporary folder inside the root, which is deleted afterwards.
    """
    return [*_profiles(plan), *_root(plan), *_links(plan), _hub(plan), *_machine(plan.definition.machine)]


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
                "note", f"profile {match.name}", f"{match.profile.title}: {signs} is present, but {match.reason}"
            )
    if all(match.root is None for match in matches):
        names = ", ".join(match.name for match in matches if not match.signs and match.reason.startswith("no "))
        absent = f"; no sign of {names}" if names else ""
        yield Finding("note", "profile", f"no provider profile matches this host{absent}")
    yield Finding("ok", "root", f"{plan.root.path} ({plan.chosen.reason})")


def _root(plan: HostPlan) -> Iterator[Finding]:
    root = plan.root
    if distrust := trust.find(root):
        if reason := provider.trust_reason(plan.chosen, plan.host, os.environ):
            yield Finding("note", "trust", f"{distrust}, which is trusted: {reason}")
        else:
            fact = f"{distrust}, so that user could give commands to firstlight"
            yield Finding("bad", "trust", fact, distrust.remedy)
    try:
        marker = read_marker(root)
    except BlockedError as error:
        yield Finding("bad", "volume", str(error), f"cat {root.marker}")
        return
    sign = absence.sign(root, plan.home, tool_caches.link_paths(os.environ, plan.home)) if marker is None else None
    if marker is not None:
        yield Finding("ok", "volume", f"{root.path} is marked since {marker.get('created')}")
    elif sign is not None:
        remedy = f"mount the volume, then {_run('repair')}; if the volume is gone for good, {sign.remedy}"
        yield Finding("bad", "volume", f"{root.path} is not mounted ({sign.fact})", remedy)
    else:
        yield Finding("note", "volume", f"{root.path} is not set up yet", _run("setup"))
    yield from _capabilities(root, plan.home)
    if len(str(root.path)) > _LONG_PREFIX:
        yield Finding(
            "note",
            "path",
            f"{root.path} is longer than {_LONG_PREFIX} characters: scripts of an environment may fail to start",
        )


def _capabilities(root: layout.Root, home: Path) -> Iterator[Finding]:
    """Yield a finding for each feature of the root's file system, with the consequence of a missing feature.

    The features come from the record in the root; without a record they are tested in a temporary folder.
    """
    folder = capabilities.existing(root.path)
    can = volume_capabilities.recorded(root) or capabilities.probe(folder)
    if not can.writable:
        yield Finding("bad", "folder", f"{folder} is not writable, or is full", "choose another root: --root DIR")
        return
    for name, supported, state, cost in _features(can):
        if supported is None:
            yield Finding("note", name, f"cannot be tested on {folder} with this operating system")
        elif supported:
            yield Finding("ok", name, f"supported on {folder}")
        else:
            fix = "choose another root: --root DIR" if state == "bad" else None
            yield Finding(state, name, f"not supported on {folder}: {cost}", fix)
    yield _mtime(folder, can)
    yield from _space(folder)
    is_same = home.exists() and folder.stat().st_dev == home.stat().st_dev
    relation = "root and home are on one file system" if is_same else "root and home are on two file systems"
    method = "renamed" if is_same else "copied"
    yield Finding("ok", "file system", f"{relation}: a relocated folder is {method}")


def _features(can: Capabilities) -> list[tuple[str, bool | None, str, str]]:
    """Return (name, is supported or None, state of the finding if it is missing, consequence) for each feature."""
    return [
        ("symlink", can.symlink, "bad", "no environment works there, and the hub cache has real files in snapshots"),
        ("execute", can.execute, "bad", "no program on it can be started, so no environment works there"),
        (
            "hardlink",
            can.hardlink,
            "note",
            "files are copied, so an environment takes its space twice, once in uv's cache",
        ),
        ("flock", can.flock, "note", f"uv's and conda's caches lie in {layout.tool_folder('packages')} instead"),
        ("chmod", can.chmod, "bad", "uv and conda cannot install there, so no environment works there"),
        ("modes", can.modes, "note", "relocated files lose their modes: private files may be readable for every user"),
        ("owners", can.owners, "note", "relocated files get the owner that the volume sets"),
        ("xattr", can.xattr, "note", "relocated files lose their extended attributes"),
        ("case", can.case, "note", "a folder with two names that differ by case only cannot be relocated"),
        ("exchange", can.exchange, "note", "a folder on it is replaced by two renames instead of one atomic exchange"),
        ("fsync", can.fsync, "note", "a power loss may destroy files that were just written"),
    ]


def _mtime(folder: Path, can: Capabilities) -> Finding:
    if can.mtime_ns is None:
        return Finding("note", "mtime", f"cannot be tested on {folder} with this operating system")
    if can.mtime_ns == 0:
        text = f"{folder} does not keep modification times: in a merge, the volume's version of a file keeps its name"
        return Finding("note", "mtime", text)
    text = f"{folder} keeps modification times in units of {_unit(can.mtime_ns)}"
    if can.mtime_ns < 10**9:
        return Finding("ok", "mtime", text)
    return Finding("note", "mtime", f"{text}: versions closer than that count as equally old in a merge")


def _unit(nanoseconds: int) -> str:
    units = ((10**9, "s"), (10**6, "ms"), (1000, "µs"), (1, "ns"))
    return next(f"{nanoseconds // size} {name}" for size, name in units if nanoseconds >= size)


def _space(folder: Path) -> Iterator[Finding]:
    """Yield findings for the free bytes and inodes; a quota is counted only if it limits the reported size."""
    free_bytes, free_inodes = capabilities.free_space(folder)
    is_short = free_bytes < _NEEDED_BYTES
    text = f"{free_bytes / 1e9:.1f} GB free at {folder}; a quota that the file system does not report may allow less"
    yield Finding("note" if is_short else "ok", "free space", text)
    if free_inodes is None:
        yield Finding("ok", "free inodes", "the file system allocates inodes on demand")
    else:
        is_short = free_inodes < _NEEDED_INODES
        yield Finding("note" if is_short else "ok", "free inodes", f"{free_inodes:,} free at {folder}")


def _links(plan: HostPlan) -> Iterator[Finding]:
    if not plan.root.links.exists():
        return
    recorded = links.recorded(plan.root, current(plan.home))
    wrong = [link for link in recorded if links.folder_on(plan.root, link.path) != link.target]
    yield Finding("ok", "links", f"{len(recorded) - len(wrong)} of {len(recorded)} links are right")
    offer = adoption.offer(plan.root, current(plan.home))
    if offer is not None:
        yield Finding("note", "links", offer)
    for link in wrong:
        target = link_target(link.path)
        state = f"is a link to {target}" if target else "is not a link" if os.path.lexists(link.path) else "is missing"
        yield Finding("bad", "link", f"{link.path} {state}; it should be a link to {link.target}", _run("repair"))
    for pid, program, path in preflight.processes_using([link.path for link in wrong if link.path.is_dir()]):
        yield Finding("note", "busy", f"pid {pid} ({program}) uses {path}")


def _hub(plan: HostPlan) -> Finding:
    hub = hub_in_use.of(plan.root)
    if hub.problem is None:
        return Finding("ok", "hub in use", f"{hub.path} (from {hub.source})")
    return Finding("note" if hub.is_found else "bad", "hub in use", f"{hub.path} (from {hub.source}): {hub.problem}")


def _machine(machine: HostFacts) -> Iterator[Finding]:
    cards = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    driver = f", driver {machine.nvidia_driver}" if machine.nvidia_driver else ""
    yield Finding(
        "ok", "machine", f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 1e9:.1f} GB, {cards}{driver}"
    )


def _run(command: str) -> str:
    return f"{layout.program()} {command}"
