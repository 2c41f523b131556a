"""Tests the disks after a power loss on which an earlier version lost content or its next command failed.

Such a disk is identified by its content, not by the number of steps, because the syncs in the code may change.
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

_MOST = 3  # at most this many disks of a kind are examined
HUB, CACHE = "home/.cache/hub", "volume/data/cache/huggingface"
TARGET, PARTIAL, ASIDE = f"{CACHE}/hub", f"{CACHE}/.hub.firstlight-partial", "home/.cache/.hub.firstlight-aside"
MIRRORS = "volume/data/.firstlight/mirrors.json"
BLOBS = f"{TARGET}/models--owner--model/blobs"


@dataclass(frozen=True)
class StateView:
    """Hold a disk after a power loss, with paths relative to the scenario's base folder.

    Attributes:
        name: the name that `crash.states` gives to the disk.
        base: the base folder.
        nodes: {path: node}.
        numbers: {path: number of its node}; two hard links have the same number.
    """

    name: str
    base: str
    nodes: dict[str, Node]
    numbers: dict[str, int]

    def link(self, path: str) -> str | None:
        """Return the target of a symbolic link, relative to the base; None if the path is no symbolic link."""
        node = self.nodes.get(path)
        if node is None or not stat.S_ISLNK(node.mode):
            return None
        return node.content.decode().removeprefix(f"{self.base}/")

    def content(self, path: str) -> bytes | None:
        node = self.nodes.get(path)
        return None if node is None else node.content

    @property
    def journals(self) -> list[list[dict[str, object]]]:
        """Return the parsed lines of each journal, without a last line that is cut off."""
        texts = [node.content for path, node in sorted(self.nodes.items()) if path.endswith(".jsonl")]
        return [[json.loads(line) for line in text.splitlines() if line.endswith(b"}")] for text in texts]

    def has_recorded(self, act: str) -> bool:
        return any(row.get("act") == act for rows in self.journals for row in rows)

    def below(self, folder: str) -> set[str]:
        return {path.removeprefix(f"{folder}/") for path in self.nodes if path.startswith(f"{folder}/")}


def is_strict(state: StateView) -> bool:
    return state.name.startswith(crash.STRICT)


def is_undone_on_record(state: StateView) -> bool:
    return state.has_recorded("undone")


def is_wrong_with_the_right_size(state: StateView) -> bool:
    """Return whether the copy of blobs/a has the size and time of its original, but other content."""
    copy, original = state.nodes.get(f"{PARTIAL}/blobs/a"), state.nodes.get(f"{HUB}/blobs/a")
    if copy is None or original is None or len(copy.content) != len(original.content):
        return False
    return copy.mtime_ns == original.mtime_ns and copy.content != original.content


def other_name(state: StateView, name: str) -> str | None:
    return next((path for path in state.nodes if path.startswith(f"{TARGET}/{name}.firstlight-")), None)


def has_two_names(state: StateView) -> bool:
    """Return whether the replaced file blobs/a has its own name, and also the name under which a merge keeps it."""
    other = other_name(state, "blobs/a")
    return other is not None and state.numbers[other] == state.numbers.get(f"{TARGET}/blobs/a")


def has_recorded_change_without_effect(state: StateView) -> bool:
    """Return whether mirrors.json has the content before the last change that a journal records."""
    now = hashlib.sha256(state.content(MIRRORS) or b"").hexdigest()
    written = [
        [row["sha256"] for row in rows if row.get("act") == "file" and str(row["path"]).endswith("/mirrors.json")]
        for rows in state.journals
    ]
    return any(len(digests) > 1 and digests[-2] == now for digests in written)


def is_restored_on_record(state: StateView) -> bool:
    return b'"restored": true' in (state.content(MIRRORS) or b"")


@dataclass(frozen=True)
class Kept:
    """Describe a kind of disks after a power loss in a scenario, by a text and by a function that recognizes them."""

    scenario: str
    description: str
    matches: Callable[[StateView], bool]


KEPT = [
    Kept(
        "move, one disk",
        "the folder is moved; the parent folders of the target are not synced",
        lambda state: is_strict(state) and state.link(HUB) == TARGET,
    ),
    Kept(
        "settings",
        "a settings file has its new content and mode",
        lambda state: is_strict(state) and b"m.example" in (state.content("home/.condarc") or b""),
    ),
    Kept(
        "undo of move, one disk",
        "the source is still a link, which leads to itself",
        lambda state: state.link(HUB) == HUB,
    ),
    Kept(
        "undo of move, one disk",
        "the journal records the run as undone, and no later change is synced",
        is_undone_on_record,
    ),
    Kept(
        "undo of merge, one disk",
        "the journal records the run as undone, and no later change is synced",
        is_undone_on_record,
    ),
    Kept(
        "settings restored",
        "mirrors.json records the restore, and no later change is synced",
        is_restored_on_record,
    ),
    Kept(
        "move, two disks",
        "a copied file has its size and time without its content",
        is_wrong_with_the_right_size,
    ),
    Kept(
        "move, two disks",
        "the copy has its final name, and the source is still complete",
        lambda state: is_strict(state) and f"{TARGET}/blobs" in state.nodes and f"{HUB}/link" in state.nodes,
    ),
    Kept(
        "move, two disks",
        "the journal records the rename of the copy to its final name, which did not happen",
        lambda state: PARTIAL in state.nodes and state.has_recorded("place"),
    ),
    Kept(
        "move, two disks",
        "the new link still has its temporary name",
        lambda state: state.link(ASIDE) == TARGET,
    ),
    Kept(
        "move, two disks",
        "the link is in place, and the original folder is beside it",
        lambda state: f"{ASIDE}/blobs/a" in state.nodes and state.link(HUB) == TARGET,
    ),
    Kept(
        "move, two disks",
        "the link is in place, and a part of the original folder is beside it",
        lambda state: 0 < len(state.below(ASIDE)) < len(state.below(TARGET)) and state.link(HUB) == TARGET,
    ),
    Kept(
        "merge, one disk",
        "the link is in place, and a part of the merged folder is beside it",
        lambda state: 0 < len(state.below(ASIDE)) < 6 and state.link(HUB) == TARGET,
    ),
    Kept(
        "merge, one disk",
        "the folder of the unfinished copy is empty",
        lambda state: PARTIAL in state.nodes and not state.below(PARTIAL),
    ),
    Kept(
        "merge, one disk",
        "the replaced file has its own name and the name under which it is kept",
        has_two_names,
    ),
    Kept(
        "merge, one disk",
        "the replaced file has only the name under which it is kept",
        lambda state: (
            is_strict(state) and other_name(state, "clash") is not None and f"{TARGET}/clash" not in state.nodes
        ),
    ),
    Kept(
        "merge, one disk",
        "the newer file has replaced the older one",
        lambda state: (
            is_strict(state) and state.content(f"{TARGET}/blobs/a") == b"hub " * 3000 and f"{HUB}/new" in state.nodes
        ),
    ),
    Kept(
        "settings",
        "the journal records a change of mirrors.json that did not happen",
        has_recorded_change_without_effect,
    ),
    Kept(
        "settings",
        "the folder of a file exists without the file",
        lambda state: "home/.config/uv" in state.nodes and not state.below("home/.config/uv"),
    ),
    Kept(
        "pull of a model",
        "some blobs have their final names, others do not exist yet",
        lambda state: is_strict(state) and 0 < len(state.below(BLOBS)) < 4,
    ),
    Kept(
        "pull of a model",
        "a ref exists only under its temporary name",
        lambda state: (
            any("refs/main.part-" in path for path in state.nodes) and f"{BLOBS[:-6]}/refs/main" not in state.nodes
        ),
    ),
]


def view_of(work: Recorded, state: Crash) -> StateView:
    base = str(work.field.base)
    rows = [(path.removeprefix(f"{base}/"), number, node) for path, number, node in state.disk.entries()]
    return StateView(
        state.name, base, {path: node for path, _, node in rows}, {path: number for path, number, _ in rows}
    )


@pytest.mark.parametrize("name", dict.fromkeys(kept.scenario for kept in KEPT))
def test_no_content_is_lost_and_follow_up_commands_succeed_on_disks_that_once_failed(
    record: Callable[[str], Recorded], name: str
) -> None:
    work = record(name)
    states = list(crash.states(work.recording, seeds=0))
    views = [view_of(work, state) for state in states]
    for kept in (kept for kept in KEPT if kept.scenario == name):
        kinds = [state for state, view in zip(states, views, strict=True) if kept.matches(view)]
        assert kinds, f"{name}: no state in which {kept.description}"
        all_scenarios.assert_safe(all_scenarios.examine(work, kinds[:: -(-len(kinds) // _MOST)]))
