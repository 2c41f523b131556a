"""Tests records that another program or host wrote: damaged ones, and ones that ask for more than firstlight does."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import BlockedError
from provision.core.layout import Root
from provision.fs import records
from provision.host import tool_caches
from provision.mirrors.tools import all_tools
from provision.models.snapshots import SnapshotStep
from provision.relocation.move_pair import MovePair
from provision.relocation.undo_merge import UndoMergeStep
from provision.setup import undo
from provision.volume import journal_acts, variables
from provision.volume.journal import Journal, read_journal

if TYPE_CHECKING:
    from pathlib import Path

COMMIT, BLOB = "a" * 40, "b" * 40


def test_names_of_variables_are_those_that_firstlight_sets(home: Path) -> None:
    set_for_mirrors = {name for group in all_tools.variable_groups() for name in group.names}
    places = tool_caches.places(tool_caches.NAMES, Root(home / "root"), {}, home, [])
    set_for_folders = {folder.variable for group in places.values() for folder in group}
    assert set_for_mirrors | set_for_folders == variables.NAMES


@pytest.mark.parametrize("name", ["LD_PRELOAD", "A;touch x;B", "", "PATH", "hf_endpoint"])
def test_variable_that_firstlight_does_not_set_is_ignored(root: Root, home: Path, name: str) -> None:
    own = variables.shell_file(root).with_suffix(".json")
    own.parent.mkdir()
    for path, schema in ((root.old_variables, 1), (own, variables.SCHEMA)):
        record = {"schema": schema, "variables": {name: "/evil", "HF_ENDPOINT": f"https://{schema}"}}
        path.write_text(json.dumps(record))
        assert variables.read(root) == {"HF_ENDPOINT": f"https://{schema}"}
    root.marker.write_text("{}")
    journal = Journal(root.journal, "setup")
    journal.record(journal_acts.VariableChange(name, None, "/evil"))
    run = undo.runs(root)[0]
    assert undo.steps(run, root, home, Journal(root.journal)) == []


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "large", "deep", "NUL", "surrogate"])
def test_record_that_no_program_may_follow_or_wait_for_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "record.json"
    (tmp_path / "other.json").write_text("{}")
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to("other.json")
        case "folder":
            path.mkdir()
        case "large":
            path.touch()
            os.truncate(path, records.MOST_BYTES + 1)
        case "deep":
            path.write_text("[" * 100 + "]" * 100)
        case "NUL":
            path.write_text(r'{"a": ["\u0000"]}')
        case "surrogate":
            path.write_text(r'{"\ud800": 1}')
    with pytest.raises(ValueError):
        records.read_json(path, follow_links=False)


def test_record_keeps_paths_of_any_bytes_and_characters(tmp_path: Path) -> None:
    content = {os.fsdecode(b"\xff"): ["\U0001f600", 1, None, {"a": [True]}]}
    (tmp_path / "record.json").write_text(json.dumps(content))
    assert records.read_json(tmp_path / "record.json") == content


def test_journal_that_is_no_file_blocks_with_its_path(root: Root) -> None:
    root.journal.mkdir()
    os.mkfifo(root.journal / "x.jsonl")
    with pytest.raises(BlockedError, match=r"x\.jsonl is not a journal"):
        undo.runs(root)


def test_act_with_lists_of_unequal_length_is_incomplete(root: Root) -> None:
    root.journal.mkdir()
    row = {"act": "links", "paths": ["/a", "/b"], "targets": ["/c"]}
    (root.journal / "x.jsonl").write_text("{}\n" + json.dumps(row) + "\n")
    [entry] = read_journal(root.journal / "x.jsonl").entries
    assert isinstance(entry.act, journal_acts.IncompleteAct)


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "a//b", "."])
def test_manifest_of_a_merge_names_no_path_outside_of_the_folder(root: Root, home: Path, path: str) -> None:
    row = {"path": path, "kind": "file", "action": "added", "other": None, "mode": 420, "size": 1, "mtime_ns": 5}
    manifest = root.state / "merge-0.json"
    manifest.write_text(json.dumps([row]))
    pair = MovePair(home / "old", root.path / "new")
    step = UndoMergeStep(pair, [manifest], root, home, Journal(root.journal), earlier_target=pair.target)
    with pytest.raises(BlockedError, match="is damaged"):
        step.check()


@pytest.mark.parametrize(
    "bad",
    [
        {"a\0b": {"size": 1, "blob_id": BLOB}},
        {"file": {"size": 1, "blob_id": BLOB}, "file/x": {"size": 1, "blob_id": BLOB}},
        {"/etc/x": {"size": 1, "blob_id": BLOB}},
        {"../x": {"size": 1, "blob_id": BLOB}},
        {"good/x": {"size": 1, "blob_id": BLOB}, "good": {"size": 1, "blob_id": BLOB}},
        {"x" * 300: {"size": 1, "blob_id": BLOB}},
        {"a/" * 3000 + "x": {"size": 1, "blob_id": BLOB}},
        {"x": {"size": "1", "blob_id": BLOB}, "y": [], "z": {"size": 1}},
        {"taken/x": {"size": 1, "blob_id": BLOB}},
    ],
    ids=["NUL", "file and folder", "absolute", "dots", "folder and file", "long", "deep", "shapes", "present"],
)
def test_row_of_a_listing_that_cannot_be_made_is_ignored(root: Root, bad: dict[str, object]) -> None:
    repo = root.hub / "models--owner--model"
    for folder in ("blobs", "trees", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "blobs" / BLOB).write_bytes(b"x")
    (repo / "snapshots" / COMMIT / "taken").symlink_to(f"../../blobs/{BLOB}")
    files = {"whole.json": {"size": 1, "blob_id": BLOB}, **bad}
    (repo / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    step = SnapshotStep(root, [], Journal(root.journal))
    step.apply()
    snapshot = repo / "snapshots" / COMMIT
    assert sorted(path.name for path in snapshot.iterdir()) == ["taken", "whole.json"]
    assert step.check().state.name == "OK"
