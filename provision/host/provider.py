"""Detects the provider of this host and selects the root. A volume counts only if it is a real mount point."""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from provision.config import host as host_config
from provision.config import toml
from provision.core import client_folders, layout
from provision.core.errors import BlockedError
from provision.host import tool_caches
from provision.volume import links, trust
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class ProfileMatch:
    """Describe whether the profile of a provider matches this host.

    `signs` are the signs of the provider that are present, such as "$NAME" or "/path"; none if a required sign is
    absent. `root` is the path of firstlight's root if the profile matches, else None. `reason` is a clause that
    explains why it matches or does not match.
    """

    name: str
    profile: host_config.Profile
    signs: tuple[str, ...]
    root: Path | None
    reason: str


@dataclass(frozen=True)
class ResolvedRoot:
    """Hold the root of this run, the reason for its choice, the profile that matched, and the folders to relocate.

    `match` is None if no profile, or more than one, matches. `candidates` has one result for each profile, also for
    those that do not match. `named` is False if neither the user, a link nor a profile gave a root; the root then lies
    in the user's data folder. In that case `warning` is a text if a sign of a provider is present, or several match.
    """

    root: layout.Root
    reason: str
    match: ProfileMatch | None
    candidates: Sequence[ProfileMatch]
    relocate: list[host_config.Relocated]
    named: bool = True
    warning: str | None = None


def choose(
    flag: str | None, host: host_config.HostSpec, envs: Path, environ: Mapping[str, str], home: Path
) -> ResolvedRoot:
    """Return the root of this run and the folders to relocate.

    The first of these roots is used: that of the flag, that of host.toml, the root to which the links of this home
    lead, the root of the only matching profile, and the user's data folder. Its `has_own_hub` is set.

    Args:
        flag: the value of --root, or None.
        host: the content of host.toml.
        envs: the `envs` folder, which contains the profiles.
        environ: the environment variables; some are signs of a provider.
        home: the home folder, whose links are read.

    Raises:
        SpecError: a profile cannot be read.
    """
    chosen = _choose(flag, host, detect(load(envs), environ), environ, home)
    return replace(chosen, root=replace(chosen.root, has_own_hub=_has_own_hub(chosen, home)))


def require_trust(
    chosen: ResolvedRoot, host: host_config.HostSpec, environ: Mapping[str, str], *, is_trusted: bool = False
) -> None:
    """Check that no other user can change the records of the root, unless the user trusts the volume.

    The volume of a provider's host is trusted: one person rents it, and no other user exists on it.

    Args:
        chosen: the root.
        host: the content of host.toml; `trust_volume` trusts the volume.
        environ: the environment variables; FIRSTLIGHT_TRUST_VOLUME=1 trusts it.
        is_trusted: a flag of the command trusts it.

    Raises:
        BlockedError: another user can; the message has the path, the fact, and the command that mends it.
    """
    if not (is_trusted or trust_reason(chosen, host, environ)):
        trust.require(chosen.root)


def trust_reason(chosen: ResolvedRoot, host: host_config.HostSpec, environ: Mapping[str, str]) -> str | None:
    """Return the reason why every user who can write to the root is trusted; None if they are not."""
    if host.trust_volume:
        return "trust_volume in host.toml"
    if environ.get(trust.VARIABLE, "").lower() in {"1", "true", "yes", "on"}:
        return trust.VARIABLE
    if chosen.match is not None and chosen.root.path == chosen.match.root:
        return f"one person rents a host of {chosen.match.profile.title}"
    return None


def _choose(
    flag: str | None,
    host: host_config.HostSpec,
    candidates: Sequence[ProfileMatch],
    environ: Mapping[str, str],
    home: Path,
) -> ResolvedRoot:
    """Return the root as `choose` does, without `has_own_hub`."""
    matches = [match for match in candidates if match.root is not None]
    match = matches[0] if len(matches) == 1 else None
    paths = tool_caches.link_paths(environ, home)
    by_hand = (layout.root_by_hand(path, home) for path in paths)
    linked = next(filter(None, itertools.chain(map(layout.linked_root, paths), by_hand)), None)
    if flag or host.root:
        root = layout.Root(Path(flag or host.root or "").expanduser().absolute())
        reason = "--root" if flag else "root in host.toml"
    elif linked is not None:
        root, reason = linked, "the links of this home lead to it"
    elif match is not None and match.root is not None:
        root, reason = layout.Root(match.root), f"profile {match.name}: {match.reason}"
    else:
        several = " and ".join(match.name for match in matches)
        reason = f"{several} both match: pass --root DIR" if several else "no profile matches and no root is named"
        # This is the state of a provider's host whose volume is not mounted.
        near = [f"{item.profile.title}: found {item.signs[0]}, but {item.reason}" for item in candidates if item.signs]
        text = f"{'; '.join(near) or reason}. The files here may be deleted: name a persistent folder with --root DIR"
        warning = text if near or several else None
        return ResolvedRoot(
            layout.Root(layout.default_root()),
            reason,
            None,
            candidates,
            host.relocate or [],
            named=False,
            warning=warning,
        )
    default: list[host_config.Relocated] = ["huggingface"]
    if match is not None and root.path == match.root:
        default = match.profile.relocate
    return ResolvedRoot(root, reason, match, candidates, default if host.relocate is None else host.relocate)


def _has_own_hub(chosen: ResolvedRoot, home: Path) -> bool:
    """Return whether the hub cache of this home stays off the root: no list and no recorded link relocates it."""
    if "huggingface" in chosen.relocate:
        return False
    hub = client_folders.default_hub(home)
    with contextlib.suppress(BlockedError):  # the steps report a record that cannot be read
        recorded = [*links.recorded(chosen.root, current(home)), *links.of_unknown_owner(chosen.root, home)]
        return all(link.path not in {hub, *hub.parents} for link in recorded)
    return False


def load(envs: Path) -> dict[str, host_config.Profile]:
    """Return {name: profile} of the files `hosts/NAME.toml` in an `envs` folder.

    Raises:
        SpecError: a profile cannot be read.
    """
    return {file.stem: toml.load(file, host_config.Profile) for file in sorted((envs / "hosts").glob("*.toml"))}


def detect(
    profiles: Mapping[str, host_config.Profile], environ: Mapping[str, str], top: Path = Path("/")
) -> list[ProfileMatch]:
    """Return for each profile whether it matches this host.

    Args:
        profiles: {name: profile}.
        environ: the environment variables; some are signs of a provider.
        top: the root of the file system; tests use another folder.
    """
    return [_match(name, profile, environ, top) for name, profile in profiles.items()]


def _match(name: str, profile: host_config.Profile, environ: Mapping[str, str], top: Path) -> ProfileMatch:
    present = [_text(sign) for sign in (*profile.any, *profile.all) if _is_present(sign, environ, top)]
    absent = [_text(sign) for sign in profile.all if not _is_present(sign, environ, top)]
    if not present or absent or (profile.any and not any(_is_present(sign, environ, top) for sign in profile.any)):
        missing = absent or [_text(sign) for sign in (*profile.any, *profile.all)]
        return ProfileMatch(name, profile, (), None, f"no {' or '.join(missing)}" if missing else "no sign defined")
    if not profile.environments:
        return ProfileMatch(
            name, profile, tuple(present), None, f"{profile.roots[0]} holds no environments: {profile.traps[0]}"
        )
    folders = [path for pattern in profile.roots for path in sorted(top.glob(pattern.lstrip("/")))]
    mounts = [folder for folder in folders if _is_mount(folder, top)]
    one_pattern = len(profile.roots) == 1
    if not mounts:
        return ProfileMatch(name, profile, tuple(present), None, f"none of {', '.join(profile.roots)} is a mount point")
    if one_pattern and len(mounts) > 1:
        several = ", ".join(map(str, mounts))
        return ProfileMatch(name, profile, tuple(present), None, f"mounted are {several}; name one with --root")
    return ProfileMatch(
        name, profile, tuple(present), mounts[0] / profile.folder, f"found {present[0]}, {mounts[0]} is a mount point"
    )


def _is_present(sign: host_config.Sign, environ: Mapping[str, str], top: Path) -> bool:
    if sign.env is not None:
        return bool(environ.get(sign.env))
    return os.path.lexists(top / (sign.path or "").lstrip("/"))


def _text(sign: host_config.Sign) -> str:
    return f"${sign.env}" if sign.env is not None else str(sign.path)


def _is_mount(folder: Path, top: Path) -> bool:
    """Return whether a folder lies on another file system than `top`, as a mounted volume does."""
    try:
        return folder.is_dir() and folder.stat().st_dev != top.stat().st_dev
    except OSError:
        return False
