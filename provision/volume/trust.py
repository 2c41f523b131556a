"""Checks that no other user can change what firstlight reads from the volume.

The records on the volume decide which links are made and which files are restored, and its programs are run. So the
records, and every folder above them up to the mount point, must belong to this user or to root, and no other user may
have the right to write them.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError
from provision.fs import capabilities, durable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from provision.core.layout import Root

VARIABLE = "FIRSTLIGHT_TRUST_VOLUME"  # "1": the user trusts everybody who can write to the volume
_SCRATCH = ".firstlight-probe-"  # as in provision.fs.capabilities, which deletes those of killed runs
_UID_MAP, _OVERFLOW_UID = Path("/proc/self/uid_map"), Path("/proc/sys/kernel/overflowuid")
_ALL_USERS = 2**32 - 1  # the number of ids in the map of the first namespace; source: man 7 user_namespaces
_PERSONS = range(1000, 60_001)  # the ids of people's accounts; source: UID_MIN and UID_MAX in login.defs
_LOCK = re.compile(r"(^|\.)lock(\.|$)")  # lock, lock.lease-1, .model-pins.json.lock
_NO_LOGIN = ("nologin", "false", "sync")


@dataclass(frozen=True)
class Distrust:
    """Describe a path that another user can change: the path, the fact, and the command that mends it."""

    path: Path
    fact: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path} {self.fact}"


@dataclass(frozen=True)
class _Trusted:
    """Hold the ids of the users whose files are trusted, and the meaning of a file's rights.

    `are_modes_fixed`: the file system gives each file the same rights. `has_modes`: the rights are evidence.
    """

    users: frozenset[int]
    are_modes_fixed: bool = False
    has_modes: bool = True


def find(root: Root) -> Distrust | None:
    """Return the first path by which another user can change the records of a root; None if there is none.

    Two kinds of file systems are no evidence: on one that shows all files as one user's, that user counts as this one;
    on one with fixed modes, the rights count only if another person has an account on this host. Windows has other
    rights, which are not checked.
    """
    if sys.platform == "win32":
        return None
    trusted = _Trusted(frozenset({0, os.geteuid(), *_unmapped_user()}))
    if _first(root, trusted) is None:
        return None
    trusted = _on_this_file_system(root, trusted)
    distrust = _first(root, trusted)
    if distrust is not None and trusted.are_modes_fixed:
        fact = f"{distrust.fact}, and no chmod has an effect there"
        return Distrust(distrust.path, fact, f"export {VARIABLE}=1")
    return distrust


def require(root: Root) -> None:
    """Check that no other user can change the records of a root.

    Raises:
        BlockedError: another user can; the message has the path, the fact, and the command that mends it.
    """
    distrust = find(root)
    if distrust is not None:
        raise BlockedError(
            f"{distrust}. What firstlight reads there would be a command of that user. Run `{distrust.remedy}`; or, if "
            f"every user who can write there may give you commands, set {VARIABLE}=1.",
            kind="untrusted",
            next_act=distrust.remedy,
        )


def make_state_folder(root: Root) -> None:
    """Make the folder of the records, which only this user can enter.

    Where other users can write to the root itself, the volume is shared on purpose, and the folder follows the umask.

    Raises:
        OSError: a folder cannot be made.
    """
    durable.make_folders(root.path)
    if sys.platform != "win32" and _judge(root.path, _Trusted(frozenset({root.path.lstat().st_uid}))) is not None:
        durable.make_folders(root.state)
    else:
        durable.make_private_folder(root.state)


def _first(root: Root, trusted: _Trusted) -> Distrust | None:
    state = capabilities.existing(root.state)
    for path in dict.fromkeys((*_upwards(state), *_upwards(state.resolve()))):
        if distrust := _judge(path, trusted):
            return distrust
    if state != root.state or stat.S_IMODE(state.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO) == 0:
        return None  # there are no records, or no other user reaches them
    return next(filter(None, (_judge_record(path, root, trusted) for path in _records(root))), None)


def _upwards(path: Path) -> Iterator[Path]:
    """Yield a folder and those above it up to the mount point."""
    yield path
    while path.parent != path and not os.path.ismount(path):
        path = path.parent
        yield path


def _records(root: Root) -> Iterator[Path]:
    """Yield the files and folders of the records.

    The journals and backups lie in private folders. Every user may write to lock files and claims, which hold no
    commands.
    """
    with suppress(OSError), os.scandir(root.state) as entries:
        yield from (Path(entry.path) for entry in entries if not _LOCK.search(entry.name))


def _judge_record(path: Path, root: Root, trusted: _Trusted) -> Distrust | None:
    if path.is_symlink():
        return Distrust(path, "is a symbolic link, which firstlight does not make", f"rm {shlex.quote(str(path))}")
    return _judge(path, trusted, root.state)


def _judge(path: Path, trusted: _Trusted, whole: Path | None = None) -> Distrust | None:
    """Return the distrust of a path by its owner and its rights; `whole` is the folder that the command mends whole."""
    path_text, recursive = shlex.quote(str(whole or path)), "-R " if whole else ""
    try:
        status = path.lstat()
    except OSError:  # it was deleted meanwhile
        return None
    mode = status.st_mode
    if status.st_uid not in trusted.users:
        own = layout.program() + " setup --root DIR"
        remedy = f"chown {recursive}0 {path_text}" if os.geteuid() == 0 else own
        return Distrust(path, f"belongs to {_user(status.st_uid)}", remedy)
    is_kept_by_owners = stat.S_ISDIR(mode) and bool(mode & stat.S_ISVTX)  # only an owner renames or deletes in it
    if stat.S_ISLNK(mode) or not trusted.has_modes or is_kept_by_owners:
        return None
    if mode & stat.S_IWOTH:
        return Distrust(
            path, f"is writable by every user (mode {stat.S_IMODE(mode):04o})", f"chmod {recursive}go-w {path_text}"
        )
    if mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
        fact = f"is writable by the group {_group(status.st_gid)} (mode {stat.S_IMODE(mode):04o})"
        return Distrust(path, fact, f"chmod {recursive}g-w {path_text}")
    return None


def _unmapped_user() -> set[int]:
    """Return the id that a user namespace shows for all users outside of it; empty in the first namespace.

    In a container without root, such as one of Apptainer, the folders of the host's root have this owner.
    """
    try:
        whole = _UID_MAP.read_text(encoding="ascii").split() == ["0", "0", str(_ALL_USERS)]
        return set() if whole else {int(_OVERFLOW_UID.read_text(encoding="ascii"))}
    except (OSError, ValueError):  # not Linux
        return set()


def _on_this_file_system(root: Root, trusted: _Trusted) -> _Trusted:
    """Return who is trusted on the root's file system, by the owner and the modes that a new folder gets there."""
    try:
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=capabilities.existing(root.state)) as scratch:
            status = os.lstat(scratch)  # made with mode 0700
    except OSError:
        return trusted
    has_fixed_modes = bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    has_modes = not has_fixed_modes or _has_other_persons()
    return _Trusted(trusted.users | {status.st_uid}, has_fixed_modes, has_modes)


def _has_other_persons() -> bool:
    """Return whether another person can log in on this host."""
    import pwd

    return any(
        account.pw_uid in _PERSONS and account.pw_uid != os.geteuid() and not account.pw_shell.endswith(_NO_LOGIN)
        for account in pwd.getpwall()
    )


def _is_own_group(group: int) -> bool:
    """Return whether a group has this user alone, as the group that many systems make for each user."""
    import grp
    import pwd

    if os.geteuid() != 0 and group != os.getegid():
        return False
    try:
        members = set(grp.getgrgid(group).gr_mem)
    except KeyError:
        members = set()
    own = {account.pw_name for account in pwd.getpwall() if account.pw_uid == os.geteuid()}
    others = {account.pw_name for account in pwd.getpwall() if account.pw_gid == group} - own
    return group == os.getegid() and not members - own and not others


def _user(user: int) -> str:
    import pwd

    try:
        return f"the user {pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"the user {user}"


def _group(group: int) -> str:
    import grp

    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)
