"""Tests the relocation step: moves on one disk and between two, unusual entries, and existing targets."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provision.core.layout import Root
from provision.core.step import State
from provision.host.tool_caches import RelocatedFolder
from provision.relocation.step import Claim, RelocateStep
from provision.volume import link_files
from provision.volume.journal import Journal
from tests.provision import random_trees
from tests.provision.folder_moves import leftovers, relocation_step, target

if TYPE_CHECKING:
    from collections.abc import Callable


def test_relocation_of_a_missing_folder_makes_a_link_to_a_new_folder_on_the_volume(source: Path, volume: Path) -> None:
    step = relocation_step(source, volume)
    assert step.check().state is State.DRIFTED
    step.apply()
    assert step.check().state is State.OK
    (source / "new").write_text("through the link")
    assert (target(step) / "new").read_text() == "through the link"


def test_folder_with_every_kind_of_entry_is_moved_unchanged(source: Path, volume: Path, home: Path) -> None:
    source.mkdir(parents=True)
    before = random_trees.fill(source)
    step = relocation_step(source, volume)
    step.apply()
    assert step.check().state is State.OK
    assert source.is_symlink()
    assert random_trees.read(target(step)) == before
    sparse = (target(step) / "sparse").stat()
    assert sparse.st_blocks * 512 < sparse.st_size / 10
    assert leftovers(home, volume) == []


def test_hard_links_between_two_folders_of_ten_thousand_files_are_kept(home: Path, other_disk: Path) -> None:
    for number in range(10_000):
        file = home / f"miniconda3/pkgs/p{number // 500}/f{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(number))
        if number % 2:
            twin = home / f"miniconda3/envs/e/f{number}"
            twin.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, twin)
    root = Root(other_disk)
    places = [RelocatedFolder(home / "miniconda3" / part, root.path / "conda" / part) for part in ("envs", "pkgs")]
    step = RelocateStep("conda", places, root, home, Journal(root.journal))
    step.apply()
    assert step.check().state is State.OK
    files = list((root.path / "conda").rglob("f*"))
    assert len(files) == 15_000
    assert len({path.stat().st_ino for path in files}) == 10_000, "hard links between the folders are kept"
    assert (home / "miniconda3/envs/e/f7777").read_text() == "7777"


def test_sparse_file_over_two_gigabytes_is_moved_and_stays_sparse(home: Path, other_disk: Path) -> None:
    """Move a file with data behind a hole, at an offset that needs more than 31 bits."""
    source = home / "big"
    source.mkdir()
    with (source / "file").open("wb") as file:
        file.truncate(2 << 30)
        file.write(b"begin")
        file.seek((2 << 30) + 17)
        file.write(b"end")
    step = relocation_step(source, other_disk)
    step.apply()
    moved = target(step) / "file"
    assert moved.stat().st_size == (2 << 30) + 20
    with moved.open("rb") as file:
        assert file.read(5) == b"begin"
        file.seek((2 << 30) + 17)
        assert file.read() == b"end"
    assert moved.stat().st_blocks * 512 < 1 << 20


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(random_trees.NAMES, min_size=1, max_size=6))
def test_file_names_of_any_bytes_are_kept_by_a_move(home: Path, other_disk: Path, names: set[bytes]) -> None:
    source = home / "names"
    shutil.rmtree(other_disk / "cache", ignore_errors=True)
    if source.is_symlink():
        source.unlink()
    source.mkdir()
    for name in names:
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(name)
    relocation_step(source, other_disk).apply()
    assert {os.fsencode(path.name) for path in source.iterdir()} == names
    for name in names:
        assert Path(os.fsdecode(os.fsencode(source) + b"/" + name)).read_bytes() == name


def test_users_link_in_the_place_of_the_folder_blocks_the_relocation(
    source: Path, volume: Path, tmp_path: Path
) -> None:
    source.parent.mkdir(parents=True)
    source.symlink_to(tmp_path / "elsewhere")
    check = relocation_step(source, volume).check()
    assert check.state is State.BLOCKED
    assert str(tmp_path / "elsewhere") in check.detail


def test_link_to_the_former_mount_point_of_the_volume_is_corrected(
    source: Path, volume: Path, tmp_path: Path, home: Path
) -> None:
    former = relocation_step(source, tmp_path / "former")
    former.apply()
    link_files.write(former.root, home, former.linked())
    shutil.copytree(former.root.path, volume, dirs_exist_ok=True)
    shutil.rmtree(former.root.path)
    step = relocation_step(source, volume)
    check = step.check()
    assert check.state is State.DRIFTED
    assert str(former.root.path) in check.detail
    step.apply()
    assert source.readlink() == target(step)


def test_link_that_the_user_changed_after_the_relocation_is_left_unchanged(
    source: Path, volume: Path, tmp_path: Path, home: Path
) -> None:
    step = relocation_step(source, volume)
    step.apply()
    link_files.write(step.root, home, step.linked())
    source.unlink()
    (tmp_path / "elsewhere").mkdir()
    source.symlink_to(tmp_path / "elsewhere")
    listed = relocation_step(source, volume).check()
    assert listed.state is State.BLOCKED
    assert f"rm {source}" in listed.detail
    for claim in (Claim.DEFAULT, Claim.RECORDED, Claim.UNKNOWN):
        left = RelocateStep("x", step.places, step.root, home, step.journal, claim=claim).check()
        assert left.state is State.OK
        assert "left alone" in (left.fallback or "")


def test_missing_folder_on_the_volume_to_which_the_link_leads_is_made_again(source: Path, volume: Path) -> None:
    step = relocation_step(source, volume)
    step.apply()
    target(step).rmdir()
    check = step.check()
    assert check.state is State.DRIFTED
    assert str(target(step)) in check.detail
    step.apply()
    assert step.check().state is State.OK


def test_file_in_the_place_of_the_folder_blocks_the_relocation(source: Path, volume: Path) -> None:
    source.parent.mkdir(parents=True)
    source.write_text("not a folder")
    assert relocation_step(source, volume).check().state is State.BLOCKED


def test_link_in_the_place_of_the_target_folder_blocks_the_relocation(
    source: Path, volume: Path, tmp_path: Path
) -> None:
    source.mkdir(parents=True)
    step = relocation_step(source, volume)
    target(step).parent.mkdir(parents=True)
    target(step).symlink_to(tmp_path / "elsewhere")
    assert step.check().state is State.BLOCKED


def test_folder_in_the_place_of_its_former_link_is_merged_with_the_folder_on_the_volume(
    source: Path, volume: Path
) -> None:
    """Merge added, equal and different files. The newer of two versions gets the name, and the older one is kept."""
    step = relocation_step(source, volume)
    old = target(step)
    (old / "refs").mkdir(parents=True)
    (source / "refs").mkdir(parents=True)
    (old / "refs/main").write_text("old")
    os.utime(old / "refs/main", (1000, 1000))
    (source / "refs/main").write_text("new")
    (source / "refs/dev").write_text("stale")
    os.utime(source / "refs/dev", (1000, 1000))
    (old / "refs/dev").write_text("fresh")
    (old / "only old").write_text("o")
    (source / "only new/deep").mkdir(parents=True)
    (source / "only new/deep/file").write_text("n")
    for folder in (old, source):
        (folder / "equal").write_text("same")
    (old / "kind").mkdir()
    (old / "kind/inner").write_text("a folder there")
    (source / "kind").write_text("a file here")
    assert "merged" in step.check().detail
    step.apply()
    check = step.check()
    assert check.state is State.OK
    assert check.fallback
    assert "3 files differ between the merged folders" in check.fallback
    assert str(old / "refs") in check.fallback
    merged = random_trees.contents(old)
    assert (old / "refs/main").read_text() == "new"
    assert (old / "refs/dev").read_text() == "fresh"
    beside = sorted(path.read_text() for path in old.glob("refs/*.firstlight-*"))
    assert beside == ["old", "stale"]
    assert (old / "only old").exists()
    assert (old / "only new/deep/file").read_text() == "n"
    assert (old / "kind").read_text() == "a file here"
    assert next(old.glob("kind.firstlight-*/inner")).read_text() == "a folder there"
    assert len(merged) == 9


def test_merge_of_a_newer_folder_with_an_older_file_gives_the_name_to_the_folder(source: Path, volume: Path) -> None:
    step = relocation_step(source, volume)
    old = target(step)
    old.mkdir(parents=True)
    (old / "kind").write_text("a file there")
    os.utime(old / "kind", (1000, 1000))
    (source / "kind").mkdir(parents=True)
    (source / "kind/inner").write_text("a folder here")
    step.apply()
    assert step.check().state is State.OK
    assert (old / "kind/inner").read_text() == "a folder here"
    assert next(old.glob("kind.firstlight-*")).read_text() == "a file there"


def test_tree_of_empty_folders_in_the_home_is_replaced_by_the_link(source: Path, volume: Path) -> None:
    (source / "left/over").mkdir(parents=True)
    step = relocation_step(source, volume)
    target(step).mkdir(parents=True)
    (target(step) / "kept").write_text("on the volume")
    step.apply()
    assert (source / "kept").read_text() == "on the volume"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_owner_of_a_file_is_kept_by_a_move(source: Path, other_disk: Path) -> None:
    source.mkdir(parents=True)
    (source / "theirs").write_text("x")
    os.chown(source / "theirs", 12345, 54321)
    relocation_step(source, other_disk).apply()
    status = (source / "theirs").stat()
    assert (status.st_uid, status.st_gid) == (12345, 54321)


def test_journal_of_a_move_to_another_disk_has_copy_place_move_and_drop_in_this_order(
    source: Path, other_disk: Path
) -> None:
    source.mkdir(parents=True)
    random_trees.small(source)
    step = relocation_step(source, other_disk)
    step.apply()
    assert step.journal.path is not None
    acts = [line.split('"act": "')[1].split('"')[0] for line in step.journal.path.read_text().splitlines()[1:]]
    assert [act for act in acts if act != "folder"] == ["copy", "place", "move", "drop"]


def test_move_on_one_file_system_needs_no_more_system_calls_for_1000_files_than_for_one(
    home: Path, tmp_path: Path
) -> None:
    """Count the system calls of a move by rename, which opens no file of the folder."""
    counts = []
    for number in (1, 1000):
        source = home / f"folder{number}"
        source.mkdir()
        for index in range(number):
            (source / f"{index}").touch()
        calls = 0

        def count(event: str, _: object) -> None:
            nonlocal calls
            calls += event in {"open", "os.scandir", "os.listdir", "os.rename", "os.link"}

        step = relocation_step(source, tmp_path / f"volume{number}")
        hooks.append(count)
        step.apply()
        hooks.clear()
        assert stat.S_ISLNK(source.lstat().st_mode)
        counts.append(calls)
    assert abs(counts[0] - counts[1]) <= 20, counts  # the number of processes in /proc changes


# Python has no way to remove an audit hook, so one hook calls the functions of this list.
hooks: list[Callable[[str, object], None]] = []


def _hook(event: str, args: object) -> None:
    for hook in hooks:
        hook(event, args)


sys.addaudithook(_hook)
