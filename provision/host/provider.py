"""Which kind of host this is, and where the root lies: by signs and a real mount, never by a guess."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.config import host as host_config
from provision.config import toml
from provision.core import layout
from provision.host import tool_caches

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ProfileMatch:
    """How one profile fits this host: `signs` that are here, and the root, or why there is none."""

    name: str
    profile: host_config.Profile
    signs: tuple[str, ...]
    root: Path | None
    reason: str


@dataclass(frozen=True)
class ResolvedRoot:
    """The root of this run, why it is this one, the profile that matched, and what is relocated.

    `named` is False where nobody has named a root and no profile knows one, so the user's data folder is taken;
    `warning` says so where a sign of a host is here all the same.
    """

    root: layout.Root
    reason: str
    match: ProfileMatch | None
    relocate: list[host_config.Relocated]
    named: bool = True
    warning: str | None = None


def choose(
    flag: str | None, host: host_config.HostSpec, envs: Path, environ: Mapping[str, str], home: Path
) -> ResolvedRoot:
    """The root: the flag's, else host.toml's, else the one that this home's links lead to, else a profile's, else ours.

    Args:
        flag: --root.
        host: what the user wrote.
        envs: the folder with the profiles.
        environ: the variables by which hosts show themselves.
        home: whose links are looked at.

    Raises:
        SpecError: a profile cannot be read.
    """
    every = detect(load(envs), environ)
    matches = [match for match in every if match.root is not None]
    match = matches[0] if len(matches) == 1 else None
    linked = next(filter(None, map(layout.linked_root, tool_caches.link_paths(environ, home))), None)
    if flag or host.root:
        root = layout.Root(Path(flag or host.root or "").expanduser().absolute())
        reason = "--root" if flag else "root in host.toml"
    elif linked is not None:
        root, reason = linked, "the links of this home lead to it"
    elif match is not None and match.root is not None:
        root, reason = layout.Root(match.root), f"profile {match.name}: {match.reason}"
    else:
        several = " and ".join(each.name for each in matches)
        reason = f"{several} both match: name one with --root" if several else "no profile matches and no root is named"
        # A host whose volume is not mounted today looks like this.
        near = [f"{each.profile.title}: {each.signs[0]} is here, but {each.reason}" for each in every if each.signs]
        warning = f"{'; '.join(near) or reason}. Nothing here may survive: name a folder that does, --root DIR"
        warned = warning if near or several else None
        return ResolvedRoot(
            layout.Root(layout.default_root()), reason, None, host.relocate or [], named=False, warning=warned
        )
    usual: list[host_config.Relocated] = ["huggingface"]
    if match is not None and root.path == match.root:
        usual = match.profile.relocate
    return ResolvedRoot(root, reason, match, usual if host.relocate is None else host.relocate)


def load(envs: Path) -> dict[str, host_config.Profile]:
    """Every profile of an envs/ folder, by its file's name.

    Raises:
        SpecError: one cannot be read.
    """
    return {file.stem: toml.load(file, host_config.Profile) for file in sorted((envs / "hosts").glob("*.toml"))}


def detect(
    profiles: Mapping[str, host_config.Profile], environ: Mapping[str, str], top: Path = Path("/")
) -> list[ProfileMatch]:
    """How each profile fits.

    Args:
        profiles: by name.
        environ: where hosts set their variables.
        top: the file system's top; another folder in tests.
    """
    return [_match(name, profile, environ, top) for name, profile in profiles.items()]


def _match(name: str, profile: host_config.Profile, environ: Mapping[str, str], top: Path) -> ProfileMatch:
    here = [_text(sign) for sign in (*profile.any, *profile.all) if _is_here(sign, environ, top)]
    absent = [_text(sign) for sign in profile.all if not _is_here(sign, environ, top)]
    if not here or absent or (profile.any and not any(_is_here(sign, environ, top) for sign in profile.any)):
        wanted = absent or [_text(sign) for sign in (*profile.any, *profile.all)]
        return ProfileMatch(name, profile, (), None, f"no {' or '.join(wanted)}" if wanted else "it has no sign")
    if not profile.environments:
        return ProfileMatch(
            name, profile, tuple(here), None, f"{profile.roots[0]} holds no environments: {profile.traps[0]}"
        )
    places = [found for pattern in profile.roots for found in sorted(top.glob(pattern.lstrip("/")))]
    mounts = [place for place in places if _is_mount(place, top)]
    one_pattern = len(profile.roots) == 1
    if not mounts:
        return ProfileMatch(
            name, profile, tuple(here), None, f"none of {', '.join(profile.roots)} is a mount of its own"
        )
    if one_pattern and len(mounts) > 1:
        several = ", ".join(map(str, mounts))
        return ProfileMatch(name, profile, tuple(here), None, f"there are several: {several}; name one with --root")
    return ProfileMatch(
        name, profile, tuple(here), mounts[0] / profile.folder, f"{here[0]} is here, {mounts[0]} is a mount"
    )


def _is_here(sign: host_config.Sign, environ: Mapping[str, str], top: Path) -> bool:
    if sign.env is not None:
        return bool(environ.get(sign.env))
    return os.path.lexists(top / (sign.path or "").lstrip("/"))


def _text(sign: host_config.Sign) -> str:
    return f"${sign.env}" if sign.env is not None else str(sign.path)


def _is_mount(place: Path, top: Path) -> bool:
    """Another file system than the top's: an absent volume leaves a plain folder."""
    try:
        return place.is_dir() and place.stat().st_dev != top.stat().st_dev
    except OSError:
        return False
