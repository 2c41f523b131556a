"""Models which user owns which bytes: the files and links that the users of two hosts on one volume must find."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.provision.fake_hub import git_sha1
from tests.torture.shared_volume import HOSTS, difference, lasting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.torture.shared_volume import Host, Reading, SharedVolume, Survey

_BLOB = re.compile(r"(?:^|/)models--[^/]+/blobs/([0-9a-f]{40}|[0-9a-f]{64})$")
_UNFINISHED = (".firstlight-partial", ".firstlight-aside")


@dataclass(frozen=True)
class Violation:
    """Describe one violation: the name of the rule, and what was expected and found."""

    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}"


@dataclass
class User:
    """Hold what one host's user must find.

    Attributes:
        files: {content: path in the home} of the files that must be at these paths.
        kept: the contents that must exist somewhere, after a wipe has removed the links that led to them.
        links: {path: target} of the links that the user has made by hand.
        adopted: {path: target} of the links to the volume that the user had made when setup succeeded. After a wipe,
            repair makes them again.
        due: {path: target} of the adopted links that a wipe has removed and that repair must make again.
        settled: whether setup or repair has succeeded since the last wipe or kill.
        linked: whether setup has succeeded, without a wipe, kill or undo after it.
        names: the names that the host has had, the present one last.
        stranger: the host has another name, and has not adopted the records of the earlier one.
    """

    files: dict[str, str] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    links: dict[str, str] = field(default_factory=dict)
    adopted: dict[str, str] = field(default_factory=dict)
    due: dict[str, str] = field(default_factory=dict)
    settled: bool = True
    linked: bool = False
    names: list[str] = field(default_factory=list)
    stranger: bool = False

    def is_unsettled(self) -> None:
        """Record that the links of the home may be missing."""
        self.settled = self.linked = False

    @property
    def contents(self) -> set[str]:
        return set(self.files) | self.kept

    def is_below_own_link(self, path: str) -> bool:
        return any(path == link or path.startswith(f"{link}/") for link in self.links)


@dataclass
class Model:
    """Hold both users, the contents that belong to no user any more, and the number of contents drawn so far."""

    users: dict[str, User] = field(default_factory=lambda: {name: User(names=[f"host{name}"]) for name in HOSTS})
    released: set[str] = field(default_factory=set)
    versions: int = 0

    def new_text(self, owner: str, path: str) -> str:
        """Return a new content, which names its owner, its path and its version."""
        self.versions += 1
        return f"{owner}:{path}:v{self.versions}\n"

    def forget(self, text: str | None) -> None:
        """Remove a content that a user has deleted or overwritten from the model; None removes nothing."""
        for user in self.users.values():
            user.files.pop(text or "", None)
            user.kept.discard(text or "")

    def wiped(self, owner: str, seen: Survey, reading: Reading) -> None:
        """Update the model after a wipe of a home.

        The contents that were only in the home, and all links, are gone. The adopted links become due.

        Args:
            owner: the host whose home was wiped.
            seen: the home before the wipe.
            reading: all disks after the wipe.
        """
        user = self.users[owner]
        unfinished = not user.settled
        whole = {
            text
            for disk in ("disk", f"{owner}/below", f"{owner}/nvme")
            for path, (_, _, text) in reading.trees[disk].items()
            if not any(part.endswith(_UNFINISHED) for part in path.split("/"))
        }
        by_link = {text for path, (_, text) in seen.files.items() if user.is_below_own_link(path)}
        for text in list(user.files):
            if text not in whole:
                del user.files[text]
            elif text in by_link or unfinished:
                del user.files[text]
                user.kept.add(text)
        user.kept &= whole
        user.due |= {path: target for path, target in user.adopted.items() if user.links.get(path) == target}
        user.links.clear()
        user.adopted.clear()
        user.is_unsettled()

    def gave_away(self, owner: str, reading: Reading) -> None:
        """Release the contents of `owner` that the other host's `undo --yes` has moved away from the volume."""
        user = self.users[owner]
        gone = user.contents - reading.own_texts(owner)
        self.released |= gone & reading.texts()
        for text in gone & reading.texts():
            self.forget(text)
        user.is_unsettled()


def top_of(path: str) -> str:
    """Return the folder in the home that is relocated as a whole: the first part of a path; with .cache, two parts."""
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == ".cache" else parts[0]


def violations(model: Model, volume: SharedVolume, reading: Reading) -> Iterator[Violation]:
    """Yield each violation of a rule about contents and links that a reading of all disks shows."""
    for name, user in model.users.items():
        seen = volume.hosts[name].survey()
        yield from _missing(name, user, reading)
        yield from _changed_links(name, user, seen)
        yield from _unreachable(name, user, volume.hosts[name], seen, reading)
        yield from _mixed(name, user, seen, model.released)
    yield from _wrong_blobs(volume, reading)


def _missing(name: str, user: User, reading: Reading) -> Iterator[Violation]:
    everywhere, own = reading.texts(), reading.own_texts(name)
    for text in sorted(user.contents):
        if text not in everywhere:
            yield Violation("lost", f"{text!r} is on no disk")
        elif text not in own:
            yield Violation("stolen", f"{text!r} of host {name} is only at {_places(reading, text)}")


def _changed_links(name: str, user: User, seen: Survey) -> Iterator[Violation]:
    for path, target in user.links.items():
        now = seen.links.get(path, "no link")
        if now != target:
            yield Violation("foreign link changed", f"on host {name}: {path} -> {target} is now {now}")


def _mixed(name: str, user: User, seen: Survey, released: set[str]) -> Iterator[Violation]:
    """Yield a violation for each private content of the other host that is reachable from this host's home."""
    other = next(host for host in HOSTS if host != name)
    for path, (real, text) in seen.files.items():
        is_private = text.startswith(f"{other}:") and not text.startswith(f"{other}:.cache/")
        if is_private and text not in released and not user.is_below_own_link(path):
            yield Violation("mixed", f"host {name} has {text!r} at ~/{path} ({real})")


def _wrong_blobs(volume: SharedVolume, reading: Reading) -> Iterator[Violation]:
    for path, (kind, _, text) in reading.trees["disk"].items():
        blob = _BLOB.search(path)
        if kind == "file" and blob and text != blob.group(1):
            content = (volume.disk / path).read_bytes()
            if blob.group(1) not in {hashlib.sha256(content).hexdigest(), git_sha1(content)}:
                yield Violation("wrong blob", f"the content of {path} does not have the checksum in its name")


def _unreachable(name: str, user: User, host: Host, seen: Survey, reading: Reading) -> Iterator[Violation]:
    if not user.settled or not host.mounted:
        return
    own = reading.own_texts(name)
    for text, path in sorted(user.files.items()):
        if text not in own:
            continue  # _missing reports this content
        tops = {top_of(found) for found, (_, there) in seen.files.items() if there == text}
        # What a tool has stored in a cache that setup made empty stays on the volume after undo.
        is_left = path.startswith(".cache/") and not user.linked and "disk/cache/" in _places(reading, text)
        if top_of(path) not in tops and not is_left:
            yield Violation("not at its path", f"{text!r} of host {name} is not at ~/{path}: {_places(reading, text)}")


def _places(reading: Reading, text: str) -> str:
    return ", ".join(
        f"{disk}/{path}"
        for disk, entries in reading.trees.items()
        for path, (_, _, content) in entries.items()
        if content == text
    )


def changed_for_other(other: str, before: Reading, after: Reading) -> Iterator[Violation]:
    """Yield a violation for each disk of the other host that a command of this host has changed."""
    for part in ("home", "below", "nvme"):
        lines = difference(before.trees[f"{other}/{part}"], after.trees[f"{other}/{part}"])
        if lines:
            yield Violation("other host changed", f"{other}/{part}\n{lines}")


def changed_at_all(before: Reading, after: Reading) -> str:
    """Return the differences of two readings as text, without locks and cached measurements; "" if there are none."""
    parts = (
        (disk, difference(lasting(before.trees[disk]), lasting(after.trees[disk]))) for disk in sorted(before.trees)
    )
    return "\n".join(f"{disk}: {lines}" for disk, lines in parts if lines)
