"""Draws the histories of two hosts on one volume: random operations of users, providers and `provision`."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tests.torture.shared_volume import HOSTS, LIMITED, OTHER_HOME, OTHER_MOUNT, SAME, Layout

if TYPE_CHECKING:
    from collections.abc import Callable

CACHES = {"huggingface": ".cache/huggingface", "pip": ".cache/pip", "torch": ".cache/torch", "uv": ".cache/uv"}
PRIVATE = ("work", "proj", "notes")
MISSING = "nothere"
_FILES = [f"{top}/{name}" for top in PRIVATE for name in ("a.txt", "b.txt", "deep/c.txt")]
_FILES += [f"{top}/{name}" for top in CACHES.values() for name in ("hub/shared.txt", "own.txt")]
# Links that a user makes by hand: (path in the home, disk of the target: the volume or the host's own NVMe disk, folder
# on that disk with {} for the host, file in that folder).
HAND_MADE = (
    (".cache/pip", "nvme", "pip", "seed.txt"),
    (".cache/torch", "volume", "torch-of-{}", "seed.txt"),
    (".cache/huggingface", "volume", "hf-of-{}", "hub/seed.txt"),
    (".cache/huggingface/hub", "volume", "hub-of-{}", "seed.txt"),
    ("proj", "volume", "projects-of-{}", "seed.txt"),
    ("work", "nvme", "work", "seed.txt"),
)
# {command of `provision`: its weight in the random choice}. "undo" takes the newest run, "undo own" a random run of the
# same host, "undo other" one of the other host.
_COMMANDS = {
    "setup": 10,
    "repair": 8,
    "relocate": 7,
    "undo": 5,
    "undo own": 2,
    "undo other": 2,
    "undo other --yes": 1,
    "pull": 3,
    "remove": 1,
    "adopt": 4,
    "gc": 2,
}
# {kind of operation: its weight in the random choice}
_EVENTS = {
    "write": 16,
    "delete": 2,
    "link": 5,
    "wipe": 4,
    "unmount": 2,
    "mount": 3,
    "hold": 3,
    "release": 3,
    "script": 2,
    "rename": 3,
    "fill": 3,
    "free": 3,
    "both": 3,
    "command": 30,
}


@dataclass(frozen=True)
class Operation:
    """Describe one operation.

    Attributes:
        host: the host that acts.
        act: the kind of operation, or the command.
        about: the arguments.
        kill: the number of the file system change before which the command is killed; None: it is not killed.
        beside: a command of the other host that runs at the same time.
    """

    host: str
    act: str
    about: tuple[str | int, ...] = ()
    kill: int | None = None
    beside: Operation | None = None

    def __str__(self) -> str:
        words = " ".join([self.host, self.act, *map(str, self.about)])
        words += f" [killed before change {self.kill}]" if self.kill else ""
        return f"{words}  ||  {self.beside}" if self.beside else words


@dataclass(frozen=True)
class History:
    """Describe one round.

    Attributes:
        seed: the random seed.
        layout: the paths of homes and mount points.
        definitions: {host: text of its host.toml}.
        relocated: {host: the caches and folders that its host.toml relocates}.
        operations: the operations in order.
    """

    seed: int
    layout: Layout
    definitions: dict[str, str]
    relocated: dict[str, tuple[str, ...]]
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, homes {self.layout.homes}, mount points {self.layout.mounts}"]
        lines += [f"volume on {self.layout.volume}{', small homes' if self.layout.small else ''}"]
        lines += [f"host {name}: relocate {', '.join(self.relocated[name])}" for name in HOSTS]
        return "\n".join([*lines, *(f"  {number}. {act}" for number, act in enumerate(self.operations, start=1))])


def drawn(seed: int) -> History:
    """Return the random history of a seed; it is the same at every call."""
    chance = random.Random(seed)  # noqa: S311 (it draws a test's history, not a secret)
    layout = chance.choice([SAME, SAME, SAME, OTHER_MOUNT, OTHER_HOME])
    volume = chance.choice(["disk", "disk", "disk", *LIMITED])
    layout = replace(layout, small=chance.random() < 0.3, volume=volume)
    definitions, relocated = {}, {}
    for name, env in zip(HOSTS, ("alpha", "beta"), strict=True):
        caches = [cache for cache in CACHES if chance.random() < (0.8 if cache == "huggingface" else 0.4)]
        private = [folder for folder in PRIVATE if chance.random() < 0.3]
        entries = [f'"{cache}"' for cache in caches]
        entries += [f'{{path = "~/{folder}", to = "of-{name}/{folder}"}}' for folder in private]
        models = '"small"' if name == "A" or chance.random() < 0.5 else '"other"'
        definitions[name] = (
            f'env = "{env}"\nmirror = "keep"\nmodels = [{models if chance.random() < 0.3 else ""}]\n'
            f"relocate = [{', '.join(entries)}]\n"
        )
        relocated[name] = (*caches, *(f"~/{folder}" for folder in private))
    operations = [_operation(chance) for _ in range(chance.randint(6, 22))]
    return History(seed, layout, definitions, relocated, tuple(operations))


def _operation(chance: random.Random) -> Operation:
    host = chance.choice(HOSTS)
    event = chance.choices(list(_EVENTS), list(_EVENTS.values()))[0]
    match event:
        case "command":
            return _command(chance, host, may_die=True)
        case "both":
            return replace(_command(chance, "A", may_die=False), beside=_command(chance, "B", may_die=False))
        case "write" | "delete" | "hold":
            return Operation(host, event, (chance.choice(_FILES),))
        case "link":
            return Operation(host, event, chance.choice(HAND_MADE))
        case _:
            return Operation(host, event)


def _command(chance: random.Random, host: str, *, may_die: bool) -> Operation:
    act = chance.choices(list(_COMMANDS), list(_COMMANDS.values()))[0]
    about: tuple[str | int, ...] = ()
    if act == "relocate":
        folders = [*PRIVATE, *PRIVATE, "pip", "torch"]
        about = (chance.choice(folders) if chance.random() < 0.95 else MISSING,)
    elif act.startswith("undo ") or act in {"pull", "remove", "adopt"}:
        about = (chance.randrange(100),)
    kill = chance.randint(1, 90) if may_die and chance.random() < 0.1 else None
    return Operation(host, act, about, kill)


def shortened(history: History, fails: Callable[[History], bool]) -> History:
    """Drop operations for which `fails` stays True without them; return the shortest history found."""
    size = max(1, len(history.operations) // 2)
    while size:
        start = 0
        while start < len(history.operations):
            fewer = history.operations[:start] + history.operations[start + size :]
            if fails(replace(history, operations=fewer)):
                history = replace(history, operations=fewer)
            else:
                start += size
        size //= 2
    return history
