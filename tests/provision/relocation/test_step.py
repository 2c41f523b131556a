"""The move of folders onto the volume: between two disks, of odd things, and onto what is there already."""

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
from provision.relocation.step import RelocateStep
from provision.volume import relink
from provision.volume.journal import Journal
from tests.provision import random_trees
from tests.provision.folder_moves import leftovers, moving, target

if TYPE_CHECKING:
    from collections.abc import Callable


def test_nothing_there_becomes_a_link(source: Path, volume: Path) -> None:
    step = moving(source, volume)
    assert step.check().state is State.DRIFTED
    step.apply()
    assert step.check().state is State.OK
    (source / "new").write_text("through the link")
    assert (target(step) / "new").read_text() == "through the link"


def test_a_filled_folder_is_moved_with_all_it_holds(source: Path, volume: Path, home: Path) -> None:
    source.mkdir(parents=True)
    held = random_trees.fill(source)
    step = moving(source, volume)
    step.apply()
    assert step.check().state is State.OK
    assert source.is_symlink()
    assert random_trees.read(target(step)) == held
    sparse = (target(step) / "sparse").stat()
    assert sparse.st_blocks * 512 < sparse.st_size / 10
    assert leftovers(home, volume) == []


def test_ten_thousand_files_and_one_file_in_two_folders(home: Path, other_disk: Path) -> None:
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


def test_one_file_of_two_gigabytes(home: Path, other_disk: Path) -> None:
    """Mostly hole, with data at its far end: offsets beyond 31 bits count."""
    source = home / "big"
    source.mkdir()
    with (source / "file").open("wb") as file:
        file.truncate(2 << 30)
        file.write(b"begin")
        file.seek((2 << 30) + 17)
        file.write(b"end")
    step = moving(source, other_disk)
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
def test_names_of_any_bytes(home: Path, other_disk: Path, names: set[bytes]) -> None:
    source = home / "names"
    shutil.rmtree(other_disk / "cache", ignore_errors=True)
    if source.is_symlink():
        source.unlink()
    source.mkdir()
    for name in names:
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(name)
    moving(source, other_disk).apply()
    assert {os.fsencode(path.name) for path in source.iterdir()} == names
    for name in names:
        assert Path(os.fsdecode(os.fsencode(source) + b"/" + name)).read_bytes() == name


def test_a_foreign_link_is_left_alone(source: Path, volume: Path, tmp_path: Path) -> None:
    source.parent.mkdir(parents=True)
    source.symlink_to(tmp_path / "elsewhere")
    found = moving(source, volume).check()
    assert found.state is State.BLOCKED
    assert str(tmp_path / "elsewhere") in found.detail


def test_a_link_of_ours_that_leads_elsewhere_is_led_back(
    source: Path, volume: Path, tmp_path: Path, home: Path
) -> None:
    step = moving(source, volume)
    step.apply()
    relink.write(step.root, home, step.linked())
    source.unlink()
    source.symlink_to(tmp_path / "elsewhere")
    found = step.check()
    assert found.state is State.DRIFTED
    assert str(tmp_path / "elsewhere") in found.detail
    step.apply()
    assert source.readlink() == target(step)


def test_a_link_whose_place_is_gone_is_mended(source: Path, volume: Path) -> None:
    step = moving(source, volume)
    step.apply()
    target(step).rmdir()
    found = step.check()
    assert found.state is State.DRIFTED
    assert str(target(step)) in found.detail
    step.apply()
    assert step.check().state is State.OK


def test_a_file_in_the_way_is_left_alone(source: Path, volume: Path) -> None:
    source.parent.mkdir(parents=True)
    source.write_text("not a folder")
    assert moving(source, volume).check().state is State.BLOCKED


def test_somebodys_link_in_the_new_place_is_left_alone(source: Path, volume: Path, tmp_path: Path) -> None:
    source.mkdir(parents=True)
    step = moving(source, volume)
    target(step).parent.mkdir(parents=True)
    target(step).symlink_to(tmp_path / "elsewhere")
    assert step.check().state is State.BLOCKED


def test_a_home_that_came_back_is_merged(source: Path, volume: Path) -> None:
    """New files are added, equal ones stay one, of unlike ones the newest has the name and the other is kept."""
    step = moving(source, volume)
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
    found = step.check()
    assert found.state is State.OK
    assert found.fallback
    assert "3 files of both places differ" in found.fallback
    assert str(old / "refs") in found.fallback
    held = random_trees.contents(old)
    assert (old / "refs/main").read_text() == "new"
    assert (old / "refs/dev").read_text() == "fresh"
    beside = sorted(path.read_text() for path in old.glob("refs/*.firstlight-*"))
    assert beside == ["old", "stale"]
    assert (old / "only old").exists()
    assert (old / "only new/deep/file").read_text() == "n"
    assert (old / "kind").read_text() == "a file here"
    assert next(old.glob("kind.firstlight-*/inner")).read_text() == "a folder there"
    assert len(held) == 9


def test_newer_folder_takes_the_name_of_a_file_there(source: Path, volume: Path) -> None:
    step = moving(source, volume)
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


def test_an_empty_folder_makes_way_for_the_link(source: Path, volume: Path) -> None:
    (source / "left/over").mkdir(parents=True)
    step = moving(source, volume)
    target(step).mkdir(parents=True)
    (target(step) / "kept").write_text("on the volume")
    step.apply()
    assert (source / "kept").read_text() == "on the volume"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_an_owner_is_kept(source: Path, other_disk: Path) -> None:
    source.mkdir(parents=True)
    (source / "theirs").write_text("x")
    os.chown(source / "theirs", 12345, 54321)
    moving(source, other_disk).apply()
    found = (source / "theirs").stat()
    assert (found.st_uid, found.st_gid) == (12345, 54321)


def test_the_journal_names_each_act_before_it(source: Path, other_disk: Path) -> None:
    source.mkdir(parents=True)
    random_trees.small(source)
    step = moving(source, other_disk)
    step.apply()
    assert step.journal.path is not None
    acts = [line.split('"act": "')[1].split('"')[0] for line in step.journal.path.read_text().splitlines()[1:]]
    assert [act for act in acts if act != "folder"] == ["copy", "place", "move", "drop"]


def test_the_time_of_a_rename_does_not_grow_with_the_folder(home: Path, tmp_path: Path) -> None:
    """On one file system nothing is read: the move makes as many system calls for one file as for a thousand."""
    counts = []
    for number in (1, 1000):
        source = home / f"folder{number}"
        source.mkdir()
        for each in range(number):
            (source / f"{each}").touch()
        seen = 0

        def count(event: str, _: object) -> None:
            nonlocal seen
            seen += event in {"open", "os.scandir", "os.listdir", "os.rename", "os.link"}

        step = moving(source, tmp_path / f"volume{number}")
        hooks.append(count)
        step.apply()
        hooks.clear()
        assert stat.S_ISLNK(source.lstat().st_mode)
        counts.append(seen)
    assert abs(counts[0] - counts[1]) <= 20, counts  # other processes' files in /proc come and go


hooks: list[Callable[[str, object], None]] = []


def _hook(event: str, args: object) -> None:
    for hook in hooks:
        hook(event, args)


sys.addaudithook(_hook)
