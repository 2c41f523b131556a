"""Computes the disks that a power loss during a recorded command may leave, by two models of a file system.

ORDERED models ext4 with data=ordered. Changes of names, sizes, modes and times reach the disk in order. An fsync of any
file also writes all earlier changes of these kinds on its file system. The bytes of a file are on the disk for certain
only after an fsync of the file: before it, a file may have its name and be empty or truncated.

STRICT models POSIX, which guarantees only synced changes. An fsync of a file writes its bytes, mode and time. An fsync
of a folder writes the names in it, and syncfs or sync writes both. Any subset of the other changes may be on the disk,
in any order. Unsynced bytes may be missing, or the file may have its full size with zeros in their place.

In both models a change of names (a rename, an exchange) is atomic, as in every journaling file system. A power loss
does not revert a change that is on the disk. The models leave out disks that ignore cache flushes, damaged blocks, and
files that show bytes of other files.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.torture.disk import Data, Disk, Names, Size, Status, Step, Sync

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from tests.torture.write_log import Recording

ORDERED, STRICT = "ordered", "strict"


@dataclass(frozen=True)
class Crash:
    """Hold a disk after a power loss.

    `name` is "MODEL COUNT CHOICE": the file system model, the number of steps before the power loss, and the choice of
    the steps that are lost, such as "strict 12 random 3".
    """

    name: str
    disk: Disk


def states(
    recording: Recording,
    *,
    seeds: int,
    only: Callable[[int], bool] = lambda _: True,
    models: Collection[str] = (ORDERED, STRICT),
) -> Iterator[Crash]:
    """Yield each distinct disk that a power loss may leave, once.

    Args:
        recording: the recorded steps.
        seeds: the number of random choices of lost steps, for each step count and each model.
        only: returns whether the power fails after this number of steps.
        models: ORDERED, STRICT or both.
    """
    seen = set[bytes]()
    for count in range(len(recording.steps) + 1):
        if not only(count):
            continue
        for name, disk in _at(recording, count, seeds):
            digest = disk.digest()
            if digest not in seen and name.partition(" ")[0] in models:
                seen.add(digest)
                yield Crash(name, disk)


def state(recording: Recording, name: str) -> Crash:
    """Return the disk to which `states` gives this name."""
    _, count, _ = name.split(" ", 2)
    seeds = int(name.rpartition("random ")[2]) + 1 if "random" in name else 0
    return next(Crash(label, disk) for label, disk in _at(recording, int(count), seeds) if label == name)


def _at(recording: Recording, count: int, seeds: int) -> Iterator[tuple[str, Disk]]:
    steps = recording.steps[:count]
    for way, kept in _ordered(steps, seeds, count):
        yield f"{ORDERED} {count} {way}", _disk(recording.before, steps, kept)
    for way, kept in _strict(steps, seeds, count):
        yield f"{STRICT} {count} {way}", _disk(recording.before, steps, kept)


# {number of a step that is on the disk: how many of its bytes are; None: all of them; -1: zeros in their place}
_Kept = dict[int, int | None]


def _ordered(steps: Sequence[Step], seeds: int, count: int) -> Iterator[tuple[str, _Kept]]:
    barriers, durable = _barriers(steps), _durable_data(steps)
    names = {number for number, step in enumerate(steps) if not isinstance(step, Data | Sync)}
    forced = {number for number in names if number < barriers.get(steps[number].file_system, 0)}
    pending = [number for number, step in enumerate(steps) if isinstance(step, Data) and number not in durable]
    data = dict.fromkeys(durable)
    yield "all dropped", dict.fromkeys(forced) | data
    yield "names kept, bytes dropped", dict.fromkeys(names) | data
    yield "all kept", dict.fromkeys(names) | data | dict.fromkeys(pending)
    file_systems = sorted({step.file_system for step in steps})
    if len(file_systems) > 1:
        for one in file_systems:
            kept = forced | {number for number in names if steps[number].file_system == one}
            yield f"names of file system {one} kept", dict.fromkeys(kept) | data
            bytes_too = [number for number in pending if steps[number].file_system == one]
            yield f"file system {one} kept", dict.fromkeys(kept) | data | dict.fromkeys(bytes_too)
    for seed in range(seeds):
        chance = random.Random(f"{ORDERED} {count} {seed}")  # noqa: S311 (it chooses the lost steps, not a secret)
        ends = {one: chance.randint(barriers.get(one, 0), len(steps)) for one in file_systems}
        kept = forced | {number for number in names if number < ends[steps[number].file_system]}
        yield f"random {seed}", dict.fromkeys(kept) | data | _some_bytes(steps, pending, chance)


def _strict(steps: Sequence[Step], seeds: int, count: int) -> Iterator[tuple[str, _Kept]]:
    forced: _Kept = dict.fromkeys(_forced(steps))
    pending = [number for number, step in enumerate(steps) if number not in forced and not isinstance(step, Sync)]
    names = [number for number in pending if not isinstance(steps[number], Data)]
    data = [number for number in pending if isinstance(steps[number], Data)]
    yield "all dropped", forced
    yield "names kept, bytes dropped", forced | dict.fromkeys(names)
    yield "names kept, bytes zero", forced | dict.fromkeys(names) | dict.fromkeys(data, -1)
    yield "later names kept, bytes dropped", forced | dict.fromkeys(names[len(names) // 2 :])
    yield "later names kept, bytes kept", forced | dict.fromkeys(names[len(names) // 2 :]) | dict.fromkeys(data)
    modes = [number for number in pending if isinstance(steps[number], Status)]
    first = {_node(steps[number]): number for number in reversed(modes)}
    yield "first modes kept", forced | dict.fromkeys((set(pending) - set(modes)) | set(first.values()))
    yield "the last change alone", forced | dict.fromkeys(pending[-1:])
    for seed in range(seeds):
        chance = random.Random(f"{STRICT} {count} {seed}")  # noqa: S311
        match seed % 3:
            case 0:  # one change is missing
                late = chance.choice(pending) if pending else None
                yield f"random {seed}", forced | dict.fromkeys(number for number in pending if number != late)
            case 1:  # one to three changes are on the disk
                early = chance.sample(pending, min(len(pending), chance.randint(1, 3)))
                yield f"random {seed}", forced | dict.fromkeys(early)
            case _:
                part = chance.random()
                kept: _Kept = dict.fromkeys(number for number in names if chance.random() < part)
                some = {number: chance.choice([None, -1]) for number in data if chance.random() < part}
                yield f"random {seed}", forced | kept | some


def _some_bytes(steps: Sequence[Step], pending: Sequence[int], chance: random.Random) -> _Kept:
    """Return a random prefix of the pending writes to each file, of which the last write is cut at a random byte."""
    kept: _Kept = {}
    for node in {step.node for step in map(steps.__getitem__, pending) if isinstance(step, Data)}:
        own = [number for number in pending if _node(steps[number]) == node]
        whole = chance.randint(0, len(own))
        kept |= dict.fromkeys(own[:whole])
        if whole < len(own):
            cut = steps[own[whole]]
            assert isinstance(cut, Data)
            kept[own[whole]] = chance.randint(0, len(cut.content))
    return kept


def _node(step: Step) -> int | None:
    return step.node if isinstance(step, Data | Size | Status) else None


def _barriers(steps: Sequence[Step]) -> dict[int, int]:
    """Return {file system: the number of its last sync step}."""
    return {step.file_system: number for number, step in enumerate(steps) if isinstance(step, Sync)}


def _durable_data(steps: Sequence[Step]) -> set[int]:
    return {number for number in _forced(steps) if isinstance(steps[number], Data)}


def _forced(steps: Sequence[Step]) -> set[int]:
    """Return the numbers of the steps that a later sync step has written to the disk, by the rules of STRICT."""
    forced = set[int]()
    whole, nodes = set[int](), set[int]()
    for number in reversed(range(len(steps))):
        step = steps[number]
        match step:
            case Sync(file_system, None):
                whole.add(file_system)
            case Sync(_, node) if node is not None:
                nodes.add(node)
            case Names(file_system, changes):
                if file_system in whole or any(change.folder in nodes for change in changes):
                    forced.add(number)
            case Data() | Size() | Status():
                if step.file_system in whole or step.node in nodes:
                    forced.add(number)
    return forced


def _disk(before: Disk, steps: Sequence[Step], kept: _Kept) -> Disk:
    disk = before.copy()
    for step in steps:  # every new inode is added, because an inode without a name is not reachable
        if isinstance(step, Names) and step.made is not None:
            disk.add(*step.made)
    count = Counter(number for below in before.names.values() for number in below.values())
    for number, step in enumerate(steps):
        if number not in kept:
            continue
        if isinstance(step, Names):
            _rename(disk, step, count)
        elif isinstance(step, Data) and kept[number] is not None:
            size = kept[number] or 0
            content = bytes(len(step.content)) if size < 0 else step.content[:size]
            disk.apply(Data(step.file_system, step.node, step.offset, content))
        else:
            disk.apply(step)
    return disk


def _rename(disk: Disk, step: Names, count: Counter[int]) -> None:
    """Apply a change of names to a disk on which earlier steps may be missing.

    Change nothing if a node to be moved is not at its old name, though it has another name.

    Args:
        disk: the disk to change.
        step: the change of names.
        count: {number of a node: how many names it has}; it is updated.
    """
    moved = {change.after for change in step.changes if change.before is not None} - {None}
    for change in step.changes:
        leaves = change.before is not None and (change.after is None or change.before in moved)
        now = disk.names[change.folder].get(change.name)
        if leaves and now != change.before and (now is not None or count[change.before or 0]):
            return
    for change in step.changes:
        below = disk.names[change.folder]
        was = below.pop(change.name, None)
        if was is not None:
            count[was] -= 1
        if change.after is not None:
            below[change.name] = change.after
            count[change.after] += 1
