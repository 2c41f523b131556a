"""Kills commands of two hosts that use one volume in turns, and checks the owner of every byte after each kill.

Each home relocates one folder and its hub cache. The name of that folder is also the name of a folder in the other
home, which is not relocated and which no command may change. Both homes share the hub cache on the volume; every other
byte belongs to one home.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.torture.kill_commands import all_below, files_below, write_definitions

if TYPE_CHECKING:
    from tests.torture.kill_commands import Commands, Ended

HUB = ".cache/huggingface/hub"
_TEMPORARY = re.compile(r"/\.[^/]*\.firstlight-(aside|partial|link)(/|$)")
_ROUNDS = 12  # the rounds after which the test starts with a new volume, because the journals grow
_MOST_KILLS = 4  # at most this many times a command is killed before it may complete


class ViolationError(Exception):
    """Report lost bytes, bytes of one home in the other, a change in the other home, or a command that fails."""


@dataclass(frozen=True)
class Owner:
    """Describe one home.

    Attributes:
        host: the host name.
        parked: the folder where the home lies while no command of it runs.
        folder: the name of the folder that this home relocates.
        still: the name of the folder that the other home relocates; this home has one too, which stays in place.
    """

    host: str
    parked: Path
    folder: str
    still: str


@dataclass(frozen=True)
class Item:
    """Describe one file of a user: its owner, its name, and the path of the top folder in the home that holds it."""

    owner: Owner
    name: str
    folder: str


@dataclass
class Figures:
    """Count what a campaign has done, and hold a text for each violation."""

    kills: Counter[str] = field(default_factory=Counter)  # {kind of command: how often it was killed}
    rounds: int = 0
    refused: int = 0  # the undos that `provision` has refused
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the figures as one line."""
        kinds = ", ".join(f"{count} in {name}" for name, count in sorted(self.kills.items()))
        return (
            f"{sum(self.kills.values())} kills ({kinds}) in {self.rounds} rounds, {self.refused} undos refused, "
            f"{len(self.violations)} violations"
        )


class TwoHomes:
    """Holds two homes and one volume, and the owner of each content."""

    def __init__(self, commands: Commands, homes: Path, volume: Path, chance: random.Random, figures: Figures) -> None:
        self.commands, self.chance, self.figures = commands, chance, figures
        self.base, self.volume = homes, volume
        self.owners = [
            Owner("host-a", homes / "a", folder="work", still="proj"),
            Owner("host-b", homes / "b", folder="proj", still="work"),
        ]
        self.items: dict[bytes, Item] = {}
        self.calls: dict[str, int] = {}
        self.has_one_path = chance.random() < 0.5
        self.number = 0

    @property
    def flags(self) -> list[object]:
        base = self.commands.base
        return ["--root", self.volume / "root", "--envs", base / "envs", "--host", base / "host.toml"]

    @property
    def root(self) -> Path:
        return self.volume / "root"

    def lay(self, template: Path) -> None:
        """Make two homes with files, and a volume that is a copy of `template`, which has an environment."""
        for folder in (self.base, self.volume):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, self.volume, symlinks=True)
        for owner in self.owners:
            parts: list[tuple[str, str]] = [(owner.folder, ""), (owner.still, ""), (HUB, f"models--{owner.host}--own")]
            for part, below in parts:
                for name in ("first", "deep/er/second", "deep/common"):
                    self.add(owner, owner.parked / part / below / name, part)
            self.add(owner, owner.parked / HUB / "common.txt", HUB)

    def add(self, owner: Owner, path: Path, folder: str) -> None:
        """Write a file of `owner` with bytes that no other file has, and record it as an item."""
        self.number += 1
        content = f"{owner.host} {folder} {path.name} {self.number}\n".encode() * self.chance.choice([1, 40, 500])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        time = 10**9 + self.chance.randrange(1000)
        os.utime(path, (time, time))
        self.items[content] = Item(owner, path.name, folder)

    def run(self, owner: Owner, *words: object, **kill: int) -> Ended:
        """Run `provision` with `words` on the host of `owner`, with `owner`'s home at the path that links use."""
        home = self.base / "home" if self.has_one_path else owner.parked
        if self.has_one_path:
            owner.parked.rename(home)
        try:
            return self.commands.run(owner.host, home, *words, **kill)
        finally:
            if self.has_one_path:
                home.rename(owner.parked)

    def round(self) -> None:
        """Run one command for one home: kill it some times, check every byte after each kill, and let it complete.

        Raises:
            ViolationError: a check fails, or the command does not succeed in the end.
        """
        self.figures.rounds += 1
        owner = self.chance.choice(self.owners)
        self.change_home(owner)
        name = self.chance.choice(["relocate", "relocate", "cache", "setup", "repair", "pull", "undo", "undo"])
        home = self.base / "home" if self.has_one_path else owner.parked
        words: dict[str, list[object]] = {
            "relocate": ["relocate", home / owner.folder, *self.flags],
            "cache": ["relocate", "huggingface", *self.flags],
            "setup": ["setup", *self.flags],
            "repair": ["repair", *self.flags],
            "pull": ["models", "pull", "m", *self.flags],
        }
        others = [other for other in self.owners if other is not owner]
        before = self.untouchable(owner, others)
        if name == "undo":
            argv = self.choose_undo(owner)
            if argv is None:
                return
        else:
            argv = words[name]
        kind = "merge" if name in {"relocate", "cache"} and self.will_merge(owner, name) else name
        for _ in range(_MOST_KILLS):
            ended = self.run(owner, *argv, **self.choose_kill(kind))
            self.check(owner, before, f"{owner.host} {kind}, exit {ended.code}", is_complete=False)
            if not ended.is_killed:
                self.calls[kind] = max(self.calls.get(kind, 40), ended.calls)
                break
            self.figures.kills[kind] += 1
            if self.chance.random() < 0.35:
                break
        ended = self.run(owner, *argv)
        self.calls[kind] = max(self.calls.get(kind, 40), ended.calls)
        what = f"{owner.host} {kind}"
        # After a killed or undone run, this home may not lead to the volume's hub. A pull then exits with 3.
        is_elsewhere = kind == "pull" and "does not lead to the volume's hub" in ended.output
        if ended.code != (3 if is_elsewhere else 0):
            raise ViolationError(f"{what} does not converge: exit {ended.code}: {ended.output[-700:]}")
        self.check(owner, before, what, is_complete=True)
        if kind in {"relocate", "merge", "cache", "setup"} and self.chance.random() < 0.4:
            self.check_settled(owner, argv, what)

    def change_home(self, owner: Owner) -> None:
        """Change a home as its user or a wipe may do between commands: new files, lost links, deleted model files."""
        own, hub = owner.parked / owner.folder, owner.parked / HUB
        for path, folder in ((own, owner.folder), (hub, HUB)):
            act = self.chance.choice(["nothing", "new file", "link lost", "came back"])
            if act == "new file" and path.is_dir():
                self.add(owner, path / f"new {self.number}", folder)
            elif act in {"link lost", "came back"} and path.is_symlink():
                path.unlink()
                if act == "came back":
                    self.add(owner, path / f"back {self.number}", folder)
                    self.add(owner, path / "deep/common", folder)
        if self.chance.random() < 0.5:
            model = self.root / "cache/huggingface/hub/models--owner--model"
            shutil.rmtree(model if self.chance.random() < 0.5 else model / "blobs", ignore_errors=True)

    def will_merge(self, owner: Owner, name: str) -> bool:
        """Return whether `relocate` will find both a real folder in the home and a target with entries."""
        path = owner.parked / (HUB if name == "cache" else owner.folder)
        target = self.root / ("cache/huggingface/hub" if name == "cache" else f"relocated/{owner.folder}")
        return path.is_dir() and not path.is_symlink() and target.is_dir() and any(target.iterdir())

    def choose_kill(self, kind: str) -> dict[str, int]:
        """Return {"at": number of a random call}, or in one of five cases {"after": random time in ns}."""
        if self.chance.random() < 0.2:
            return {"after": self.chance.randrange(1_000_000, 100_000_000)}
        return {"at": self.chance.randint(1, self.calls.get(kind, 40))}

    def choose_undo(self, owner: Owner) -> list[object] | None:
        """Return the arguments that undo this home's newest run.

        Return None if no run is left, or if `provision` refuses the undo. A refused undo must change nothing.

        Raises:
            ViolationError: the dry run reports a refusal, but the undo succeeds or changes something.
        """
        flags = self.flags[:2]
        listed = self.run(owner, "undo", "--list", "--json", *flags)
        rows = json.loads(listed.output)["runs"]
        names = [row["run"] for row in rows if row["host"] == owner.host and not row["undone"] and row["acts"]]
        if not names:
            return None
        argv = ["undo", names[-1], *flags]
        dry_run = self.run(owner, *argv, "--dry-run")
        if dry_run.code in {0, 3}:
            return argv
        tops = [*(other.parked for other in self.owners), self.root / "relocated", self.root / "cache"]
        before = self.fingerprint(tops)
        ended = self.run(owner, *argv)
        self.figures.refused += 1
        changed = sorted(path for path, _ in set(before.items()) ^ set(self.fingerprint(tops).items()))
        if ended.code == 0 or changed:
            raise ViolationError(
                f"{owner.host} undo: the dry run ends with {dry_run.code}, and the run with {ended.code} after changes "
                f"of {changed[:3]}: {dry_run.output[-500:]}"
            )
        return None

    def places(self, item: Item) -> tuple[str, ...]:
        """Return the path prefixes at which the content of an item may be."""
        home = item.owner.parked
        if item.folder == item.owner.still:
            return (f"{home}/{item.folder}/",)
        folder = Path(item.folder)
        beside = home / folder.parent / f".{folder.name}.firstlight-"
        at_home = (f"{home}/{folder}/", str(beside))
        if item.folder == HUB:
            return (*at_home, f"{self.root}/cache/huggingface/")
        return (*at_home, f"{self.root}/relocated/{folder}/", f"{self.root}/relocated/.{folder}.firstlight-")

    def untouchable(self, owner: Owner, others: list[Owner]) -> dict[str, object]:
        """Return the fingerprint of all files that a command of `owner` must not change."""
        tops = [owner.parked / owner.still]
        for other in others:
            tops += [other.parked, *(self.root / "relocated").glob(f"*{other.folder}*")]
        return self.fingerprint(tops)

    def check(self, owner: Owner, before: dict[str, object], what: str, *, is_complete: bool) -> None:
        """Check that every content exists where its owner's files may be, and that no file of another home has changed.

        Args:
            owner: the home whose command has run.
            before: the result of `untouchable` before the command.
            what: a description of the command for the error.
            is_complete: the command has ended without a kill, so no temporary name and no second copy may be left.

        Raises:
            ViolationError: a check fails.
        """
        others = [other for other in self.owners if other is not owner]
        now = self.untouchable(owner, others)
        if now != before:
            paths = sorted(path for path in {*now, *before} if now.get(path) != before.get(path))
            raise ViolationError(f"{what}: touched {paths[:5]}")
        places = self.paths_by_content()
        journaled = self.journaled()
        for content, item in self.items.items():
            problem = self.problem_of(item, places.get(content, []), journaled)
            if problem is None and item.folder == HUB and item.owner is not owner:
                problem = self.unreachable(item, places[content])
            # If a run completed a killed one and is undone, home and volume both hold what the killed run has merged.
            most = 1 if (item.owner.parked / item.folder).is_symlink() else 2
            if problem is None and is_complete and len(places[content]) > most:
                problem = f"{item.name} exists {len(places[content])} times: {places[content]}"
            if problem is not None:
                raise ViolationError(f"{what}: {problem}")
        # Only a killed command may leave a temporary name.
        left = [path for path in all_below(self.base, self.root) if _TEMPORARY.search(path)]
        if is_complete and left:
            raise ViolationError(f"{what}: left over: {left[:3]}")

    def paths_by_content(self) -> dict[bytes, list[str]]:
        contents: dict[bytes, list[str]] = {}
        for top in (self.base, self.root / "relocated", self.root / "cache/huggingface"):
            for path in files_below(top):
                contents.setdefault(Path(path).read_bytes(), []).append(path)
        return contents

    def problem_of(self, item: Item, paths: list[str], journaled: tuple[str, ...]) -> str | None:
        """Return a text if an item's content is lost, at a foreign path, or in no journal though on the volume."""
        if not paths:
            return f"lost {item.folder}/…/{item.name} of {item.owner.host}"
        wrong = [path for path in paths if not path.startswith(self.places(item))]
        if wrong:
            return f"{wrong[0]} is a file of {item.owner.host}, of its {item.folder}"
        on_volume = [path for path in paths if path.startswith(str(self.root))]
        if len(on_volume) == len(paths) and not any(path.startswith(journaled) for path in on_volume):
            return f"no journal names {on_volume[0]}"
        return None

    def unreachable(self, item: Item, paths: list[str]) -> str | None:
        """Return a text if the hub cache of the item's home is a link that does not lead to the item; else None."""
        link = item.owner.parked / HUB
        if not link.is_symlink() or any(path.startswith(f"{link.resolve()}/") for path in paths):
            return None
        return f"{item.owner.host} cannot reach {paths[0]} any more"

    def check_settled(self, owner: Owner, argv: list[object], what: str) -> None:
        """Check that the home reaches its files by their old paths, and that a second run changes nothing."""
        folder = HUB if argv[0] == "setup" or argv[1] == "huggingface" else owner.folder
        link = owner.parked / folder
        if not link.is_symlink():
            raise ViolationError(f"{what}: {link} is no link")
        reached = {Path(path).read_bytes() for path in files_below(link.resolve())}
        own = {content: item for content, item in self.items.items() if item.owner is owner and item.folder == folder}
        missing = [item.name for content, item in own.items() if content not in reached]
        if missing:
            raise ViolationError(f"{what}: {link} does not lead to {missing[:3]}")
        journals = sorted((self.root / ".firstlight/journal").iterdir())
        again = self.run(owner, *argv)
        is_changed = sorted((self.root / ".firstlight/journal").iterdir()) != journals
        if again.code != 0 or "ready" not in again.output or is_changed:
            raise ViolationError(f"{what}: the second run is not without a change: {again.output[-500:]}")

    def journaled(self) -> tuple[str, ...]:
        """Return the paths that any journal names."""
        paths = set[str]()
        for path in (self.root / ".firstlight/journal").glob("*.jsonl"):
            for line in path.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the last line of a killed run
                    continue
                paths |= {row[key] for key in ("source", "target", "aside", "partial", "whole", "path") if row.get(key)}
        return tuple(paths)

    def fingerprint(self, tops: list[Path]) -> dict[str, object]:
        """Return {path: (mode, size, time in ns, inode, target of a link)} of all entries below some folders."""
        entries: dict[str, object] = {}
        for path in all_below(*tops):
            status = os.lstat(path)
            target = Path(path).readlink() if stat.S_ISLNK(status.st_mode) else None
            entries[path] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, target)
        return entries


def run(commands: Commands, homes: Path, volume: Path, *, kills: int, seed: int) -> Figures:
    """Run rounds until `kills` commands were killed, and return the figures; after a violation, start a new volume."""
    chance = random.Random(seed)  # noqa: S311 (it chooses acts and kills, and needs no secrecy)
    figures = Figures()
    write_definitions(commands.base, commands.wheels)
    template = commands.base / "template"
    first: list[Any] = [
        "--root",
        volume / "root",
        "--envs",
        commands.base / "envs",
        "--host",
        commands.base / "first.toml",
    ]
    home = commands.base / "first-home"
    home.mkdir()
    ended = commands.run("host-a", home, "setup", *first)
    assert ended.code == 0, ended.output
    shutil.copytree(volume, template, symlinks=True)
    shutil.rmtree(template / "root/.firstlight/journal")
    while sum(figures.kills.values()) < kills:
        two = TwoHomes(commands, homes, volume, chance, figures)
        two.lay(template)
        try:
            for _ in range(_ROUNDS):
                two.round()
        except ViolationError as error:
            figures.violations.append(str(error))
    return figures
