"""States in which something was lost, or no command got to its end, each kept with what tells it.

A state is found by what is on the disk, not by the number of a step: what is forced to the disk may change.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable  # noqa: TC003 (a dataclass's field)
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.torture import all_scenarios, crash

if TYPE_CHECKING:
    from tests.torture.all_scenarios import Recorded
    from tests.torture.crash import Crash
    from tests.torture.disk import Node

_MOST = 3  # states of a kind
HUB, CACHE = "home/.cache/hub", "volume/data/cache/huggingface"
TARGET, PARTIAL, ASIDE = f"{CACHE}/hub", f"{CACHE}/.hub.firstlight-partial", "home/.cache/.hub.firstlight-aside"
MIRRORS = "volume/data/.firstlight/mirrors.json"
BLOBS = f"{TARGET}/models--owner--model/blobs"


@dataclass(frozen=True)
class Seen:
    """A state by its paths below the base."""

    name: str
    base: str
    nodes: dict[str, Node]
    numbers: dict[str, int]

    def link(self, path: str) -> str | None:
        """Where a link leads, from the base; None where there is none."""
        node = self.nodes.get(path)
        if node is None or not stat.S_ISLNK(node.mode):
            return None
        return node.content.decode().removeprefix(f"{self.base}/")

    def content(self, path: str) -> bytes | None:
        node = self.nodes.get(path)
        return None if node is None else node.content

    @property
    def journals(self) -> list[list[dict[str, object]]]:
        """The lines of each journal that are whole."""
        texts = [node.content for path, node in sorted(self.nodes.items()) if path.endswith(".jsonl")]
        return [[json.loads(line) for line in text.splitlines() if line.endswith(b"}")] for text in texts]

    def has_recorded(self, act: str) -> bool:
        return any(row.get("act") == act for rows in self.journals for row in rows)

    def below(self, folder: str) -> set[str]:
        return {path.removeprefix(f"{folder}/") for path in self.nodes if path.startswith(f"{folder}/")}


def is_strict(state: Seen) -> bool:
    return state.name.startswith(crash.STRICT)


def is_undone_on_record(state: Seen) -> bool:
    return state.has_recorded("undone")


def is_wrong_with_the_right_size(state: Seen) -> bool:
    """The copy has the size and the time of its original, and zeros."""
    made, whole = state.nodes.get(f"{PARTIAL}/blobs/a"), state.nodes.get(f"{HUB}/blobs/a")
    if made is None or whole is None or len(made.content) != len(whole.content):
        return False
    return made.mtime_ns == whole.mtime_ns and made.content != whole.content


def other_name(state: Seen, name: str) -> str | None:
    return next((path for path in state.nodes if path.startswith(f"{TARGET}/{name}.firstlight-")), None)


def is_linked_only(state: Seen) -> bool:
    """What gives way has its other name, and its own still."""
    other = other_name(state, "blobs/a")
    return other is not None and state.numbers[other] == state.numbers.get(f"{TARGET}/blobs/a")


def is_change_recorded_and_not_made(state: Seen) -> bool:
    """The record of the mirrors is as the last change but one has left it."""
    now = hashlib.sha256(state.content(MIRRORS) or b"").hexdigest()
    written = [
        [row["sha256"] for row in rows if row.get("act") == "file" and str(row["path"]).endswith("/mirrors.json")]
        for rows in state.journals
    ]
    return any(len(digests) > 1 and digests[-2] == now for digests in written)


def is_taken_back_on_record(state: Seen) -> bool:
    return b'"restored": true' in (state.content(MIRRORS) or b"")


@dataclass(frozen=True)
class Kept:
    """A kind of state of a scenario: what is on the disk, and how it is told."""

    scenario: str
    what: str
    tells: Callable[[Seen], bool]


KEPT = [
    Kept(
        "move, one disk",
        "the folder is moved, and the folders above its place have an fsync of their own",
        lambda state: is_strict(state) and state.link(HUB) == TARGET,
    ),
    Kept(
        "settings",
        "a file has its new content, and its mode",
        lambda state: is_strict(state) and b"m.example" in (state.content("home/.condarc") or b""),
    ),
    Kept(
        "undo of move, one disk",
        "the link that undo has prepared leads to itself",
        lambda state: state.link(HUB) == HUB,
    ),
    Kept(
        "undo of move, one disk",
        "the run is on record as undone, and nothing later is forced",
        is_undone_on_record,
    ),
    Kept(
        "undo of merge, one disk",
        "the run is on record as undone, and nothing later is forced",
        is_undone_on_record,
    ),
    Kept(
        "settings restored",
        "the choice is taken back on record, and nothing later is forced",
        is_taken_back_on_record,
    ),
    Kept(
        "move, two disks",
        "a copied file has its size and time without its content",
        is_wrong_with_the_right_size,
    ),
    Kept(
        "move, two disks",
        "the copy has its name",
        lambda state: is_strict(state) and f"{TARGET}/blobs" in state.nodes and f"{HUB}/link" in state.nodes,
    ),
    Kept(
        "move, two disks",
        "the copy is to be placed",
        lambda state: PARTIAL in state.nodes and state.has_recorded("place"),
    ),
    Kept(
        "move, two disks",
        "the link is prepared",
        lambda state: state.link(ASIDE) == TARGET,
    ),
    Kept(
        "move, two disks",
        "the original waits beside the link",
        lambda state: f"{ASIDE}/blobs/a" in state.nodes and state.link(HUB) == TARGET,
    ),
    Kept(
        "move, two disks",
        "a part of the original waits beside the link",
        lambda state: 0 < len(state.below(ASIDE)) < len(state.below(TARGET)) and state.link(HUB) == TARGET,
    ),
    Kept(
        "merge, one disk",
        "a part of the merged folder waits beside the link",
        lambda state: 0 < len(state.below(ASIDE)) < 6 and state.link(HUB) == TARGET,
    ),
    Kept(
        "merge, one disk",
        "the stage is made, and nothing is on it",
        lambda state: PARTIAL in state.nodes and not state.below(PARTIAL),
    ),
    Kept(
        "merge, one disk",
        "what gives way has two names",
        is_linked_only,
    ),
    Kept(
        "merge, one disk",
        "what gave way has its other name alone",
        lambda state: (
            is_strict(state) and other_name(state, "clash") is not None and f"{TARGET}/clash" not in state.nodes
        ),
    ),
    Kept(
        "merge, one disk",
        "the newer file has the name",
        lambda state: (
            is_strict(state) and state.content(f"{TARGET}/blobs/a") == b"hub " * 3000 and f"{HUB}/new" in state.nodes
        ),
    ),
    Kept(
        "settings",
        "a change is on record and not made",
        is_change_recorded_and_not_made,
    ),
    Kept(
        "settings",
        "the folder of a file is made and not the file",
        lambda state: "home/.config/uv" in state.nodes and not state.below("home/.config/uv"),
    ),
    Kept(
        "pull of a model",
        "a blob has its name",
        lambda state: is_strict(state) and 0 < len(state.below(BLOBS)) < 4,
    ),
    Kept(
        "pull of a model",
        "a ref is being written",
        lambda state: (
            any("refs/main.part-" in path for path in state.nodes) and f"{BLOBS[:-6]}/refs/main" not in state.nodes
        ),
    ),
]


def seen(work: Recorded, state: Crash) -> Seen:
    base = str(work.field.base)
    rows = [(path.removeprefix(f"{base}/"), number, node) for path, number, node in state.disk.entries()]
    return Seen(state.name, base, {path: node for path, _, node in rows}, {path: number for path, number, _ in rows})


@pytest.mark.parametrize("name", dict.fromkeys(kept.scenario for kept in KEPT))
def test_command_goes_on_from_the_states_that_once_stopped_it(record: Callable[[str], Recorded], name: str) -> None:
    work = record(name)
    states = list(crash.states(work.recording, seeds=0))
    pictures = [seen(work, state) for state in states]
    for kept in (kept for kept in KEPT if kept.scenario == name):
        kinds = [state for state, picture in zip(states, pictures, strict=True) if kept.tells(picture)]
        assert kinds, f"{name}: no state in which {kept.what}"
        all_scenarios.is_safe(all_scenarios.examine(work, kinds[:: -(-len(kinds) // _MOST)]))
