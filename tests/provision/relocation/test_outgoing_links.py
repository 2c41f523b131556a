"""Tests relative links out of a moved folder: they still lead to the same places, and undo restores their texts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from provision.core.layout import Root
from provision.core.step import State
from provision.fs.open_dir import link_target
from provision.host.tool_caches import RelocatedFolder
from provision.relocation.step import RelocateStep
from provision.setup import undo as undo_runs
from provision.volume.journal import Journal
from tests.provision import random_trees
from tests.provision.folder_moves import leftovers, relocation_step, target

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def comfy(home: Path) -> Path:
    """Return a folder `ComfyUI` with links of every kind; the weights are in the folder `drive` beside `ComfyUI`."""
    folder = home / "ComfyUI"
    (folder / "models/loras").mkdir(parents=True)
    (home / "drive/ckpt").mkdir(parents=True)
    (home / "drive/ckpt/a.safetensors").write_text("weights")
    (folder / "models/loras/own").write_text("of its own")
    (folder / "models/checkpoints").symlink_to("../../drive/ckpt")
    (folder / "models/.//a").symlink_to(".//../models/../../drive/./ckpt/a.safetensors")
    (folder / "home").symlink_to("..")
    (folder / "own").symlink_to("models/loras/own")
    (folder / "models/own").symlink_to("../models/loras/../loras/own")
    (folder / "by name").symlink_to("../ComfyUI/models/loras/own")
    (folder / "dangling").symlink_to("../../nowhere")
    (folder / "absolute").symlink_to(home / "drive")
    (folder / "through absolute").symlink_to("absolute/ckpt/a.safetensors")
    (folder / "through relative").symlink_to("models/checkpoints/../ckpt/a.safetensors")
    for number, path in enumerate(sorted(folder.rglob("*"), key=lambda item: -len(item.parts))):
        os.utime(path, ns=(10**18, 10**18 + number), follow_symlinks=False)
    return folder


OUTGOING = {"models/checkpoints", "models/a", "home", "by name"}


def undo(root: Path, home: Path) -> None:
    journal = Journal(Root(root).journal, "undo")
    for step in undo_runs.steps(undo_runs.runs(Root(root))[-1], Root(root), home, journal):
        if step.check().state is not State.OK:
            step.apply()
        assert step.check().state is State.OK


@pytest.mark.parametrize("is_merge", [False, True], ids=["move", "merge"])
def test_relative_links_out_of_a_moved_folder_keep_their_targets_and_undo_restores_their_texts(
    comfy: Path, home: Path, volume: Path, is_merge: bool
) -> None:
    step = relocation_step(comfy, volume)
    if is_merge:
        target(step).mkdir(parents=True)
        (target(step) / "of the volume").write_text("v")
    before = random_trees.read(comfy)
    texts = {name: link_target(comfy / name) for name in OUTGOING}
    places = {name: os.path.realpath(comfy / name) for name in OUTGOING}
    folder_time = (comfy / "models").stat().st_mtime_ns
    step.apply()
    check = step.check()
    assert check.state is State.OK
    assert check.fallback is not None
    assert "4 relative links that lead out of the folder are absolute now" in check.fallback
    moved = random_trees.read(target(step))
    for name, entry in before.items():
        if name not in OUTGOING:
            assert moved[name] == entry
    assert (comfy / "models").stat().st_mtime_ns == folder_time
    assert (comfy / "models/checkpoints").readlink() == home / "drive/ckpt"
    assert {name: os.path.realpath(comfy / name) for name in OUTGOING - {"by name"}} == {
        name: place for name, place in places.items() if name != "by name"
    }
    assert (comfy / "by name").read_text() == "of its own"
    assert (comfy / "through relative").read_text() == "weights"
    undo(volume, home)
    assert not comfy.is_symlink()
    assert random_trees.read(comfy) == before
    assert {name: link_target(comfy / name) for name in OUTGOING} == texts
    assert leftovers(home, volume) == []


def test_relative_link_between_two_folders_that_move_together_keeps_its_text(home: Path, other_disk: Path) -> None:
    for name in ("envs", "pkgs"):
        (home / "conda" / name).mkdir(parents=True)
        (home / "conda" / name / "file").write_text(name)
    (home / "conda/envs/kept").symlink_to("../pkgs/file")
    (home / "conda/envs/out").symlink_to("../other")
    (home / "conda/other").write_text("o")
    root = Root(other_disk)
    places = [RelocatedFolder(home / "conda" / part, root.path / "c" / part) for part in ("envs", "pkgs")]
    RelocateStep("conda", places, root, home, Journal(root.journal)).apply()
    assert link_target(home / "conda/envs/kept") == "../pkgs/file"
    assert (home / "conda/envs/kept").read_text() == "pkgs"
    assert (home / "conda/envs/out").read_text() == "o"


def test_undo_keeps_a_link_that_the_user_has_changed_in_the_moved_folder(comfy: Path, home: Path, volume: Path) -> None:
    relocation_step(comfy, volume).apply()
    (comfy / "models/checkpoints").unlink()
    (comfy / "models/checkpoints").symlink_to(home)
    undo(volume, home)
    assert (comfy / "models/checkpoints").readlink() == home
    assert link_target(comfy / "home") == ".."


def test_move_of_a_folder_whose_only_outgoing_link_is_dangling_records_no_link_text(home: Path, volume: Path) -> None:
    (home / "plain/a").mkdir(parents=True)
    (home / "plain/link").symlink_to("a")
    (home / "plain/nowhere").symlink_to("../nowhere")
    relocation_step(home / "plain", volume).apply()
    assert all('"texts"' not in journal.read_text() for journal in Root(volume).journal.iterdir())
