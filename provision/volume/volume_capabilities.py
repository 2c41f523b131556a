"""Records the features of the root's file system in a file beside the marker, for each host and user."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from provision.core.errors import BlockedError
from provision.fs import capabilities, records
from provision.fs.atomic import write_atomic
from provision.fs.capabilities import Capabilities
from provision.fs.mount import mount_of

if TYPE_CHECKING:
    from provision.core.layout import Root

SCHEMA = 1
_MOST_HOSTS = 64  # a limit is needed because every rented host has another name


def recorded(root: Root) -> Capabilities | None:
    """Return the recorded features for this host and user.

    The result is None if there is no record, or the volume has another mount or other mount options now.
    """
    entry = _hosts(root).get(_host())
    if not isinstance(entry, dict) or entry.get("mount") != _mount(root):
        return None
    known = {field.name for field in fields(Capabilities)}
    values = entry.get("capabilities")
    if not isinstance(values, dict) or not isinstance(values.get("writable"), bool):
        return None
    kinds = {name: (int if name == "mtime_ns" else bool, type(None)) for name in known}
    features = {name: value for name, value in values.items() if name in known}
    return Capabilities(**features) if all(type(value) in kinds[name] for name, value in features.items()) else None


def known(root: Root) -> Capabilities:
    """Return the recorded features; without a record, those that can be read without a write."""
    return recorded(root) or capabilities.look(capabilities.existing(root.path))


def ensure(root: Root) -> Capabilities:
    """Return the features of the root's file system; if there is no record, test and record them.

    The test uses a temporary folder in the root's folder of records, if that exists. Without a marker nothing is
    recorded.
    """
    present = recorded(root)
    if present is not None:
        return present
    tested = capabilities.probe(capabilities.existing(root.state))
    if tested.writable and root.marker.is_file():
        hosts = {name: entry for name, entry in _hosts(root).items() if name != _host()}
        hosts[_host()] = {"mount": _mount(root), "capabilities": asdict(tested)}
        kept = dict(list(hosts.items())[-_MOST_HOSTS:])
        with contextlib.suppress(PermissionError):  # a root of another user
            write_atomic(root.capabilities, json.dumps({"schema": SCHEMA, "hosts": kept}, indent=1) + "\n")
    return tested


def environment_obstacle(root: Root, can: Capabilities | None = None) -> str | None:
    """Return the reason why no environment works on the root's file system, with the next command; else None.

    Args:
        root: the root.
        can: the features of the root's file system; default: the result of `known`.
    """
    can = can or known(root)
    reasons = [
        reason
        for feature, reason in (
            (can.execute, f"no program on {root.path} can be started"),
            (can.symlink, f"{root.path} cannot store symbolic links"),
            (can.chmod, f"chmod fails on {root.path}"),
        )
        if feature is False
    ]
    if not reasons:
        return None
    mount = mount_of(capabilities.existing(root.path))
    remedy = "Give another root: --root DIR"
    kind = ""
    if mount is not None:
        is_noexec = "noexec" in mount.options
        kind = f" ({mount.file_system} at {mount.point}{', mounted with noexec' if is_noexec else ''})"
        if is_noexec and len(reasons) == 1:
            remedy += f"; or mount it with exec: mount -o remount,exec {mount.point}"
    return f"{' and '.join(reasons)}{kind}, so no environment works there, and none was installed. {remedy}"


def require_environment(root: Root) -> None:
    """Check that an environment works on the root's file system; test the file system if its features are not recorded.

    Raises:
        BlockedError: no environment works there; the message has the reason and the next command.
    """
    obstacle = environment_obstacle(root, ensure(root))
    if obstacle:
        raise BlockedError(obstacle)


def given_up(can: Capabilities) -> list[str]:
    """Return a clause for each kind of metadata that files lose when they are moved to this file system."""
    clauses = []
    if can.modes is False:
        clauses.append("modes (every user may be able to read a private file)")
    if can.owners is False:
        clauses.append("owners")
    if can.xattr is False:
        clauses.append("extended attributes")
    if can.mtime_ns == 0:
        clauses.append("modification times")
    elif can.mtime_ns is not None and can.mtime_ns >= 10**9:
        clauses.append(f"modification times finer than {can.mtime_ns // 10**9} s")
    return clauses


def _hosts(root: Root) -> dict[str, Any]:
    try:
        record = records.read_state(root.capabilities)
    except (OSError, ValueError):
        return {}
    hosts = record.get("hosts") if record.get("schema") == SCHEMA else None
    return hosts if isinstance(hosts, dict) else {}


def _host() -> str:
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    return f"{platform.node()} {user}"


def _mount(root: Root) -> dict[str, object]:
    """Return a text that identifies the mount of the root; it differs after a new mount or with other options."""
    folder = capabilities.existing(root.path)
    mount = mount_of(folder)
    return {
        "device": folder.stat().st_dev,
        "file_system": mount.file_system if mount else None,
        "options": list(mount.options) if mount else [],
    }
