"""The move of a folder onto the volume: between two disks, killed at every act, and onto what is not ours."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from provision.errors import BlockedError, FirstlightError
from provision.journal import Journal
from provision.relocate import RelocateStep
from provision.step import State

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTENT = {"hub/blobs/a": "weights", "hub/blobs/b": "", "hub/deep/er/c.json": "{}"}


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A folder on another file system than the temporary one."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["same disk", "other disk"])
def volume(request: pytest.FixtureRequest, tmp_path: Path, other_disk: Path) -> Path:
    folder = tmp_path / "volume" if request.param == "same disk" else other_disk
    if request.param == "other disk" and folder.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one file system only")
    return folder


@pytest.fixture
def source(home: Path) -> Path:
    return home / ".cache/huggingface/hub"


def fill(folder: Path) -> dict[str, str]:
    for path, text in CONTENT.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "link").symlink_to("hub/blobs/a")
    return read(folder)


def read(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_text()
    return found


def move(source: Path, volume: Path) -> RelocateStep:
    return RelocateStep("huggingface", source, volume / "cache/huggingface/hub", Journal(volume / "journal"))


def test_nothing_there_becomes_a_link(source: Path, volume: Path) -> None:
    step = move(source, volume)
    assert step.check().state is State.DRIFTED
    step.apply()
    assert step.check().state is State.OK
    (source / "new").write_text("through the link")
    assert (step.target / "new").read_text() == "through the link"


def test_a_filled_folder_is_moved_with_all_it_holds(source: Path, volume: Path) -> None:
    held = fill(source)
    step = move(source, volume)
    step.apply()
    assert step.check().state is State.OK
    assert source.is_symlink()
    assert read(step.target) == held
    assert not step.aside.exists()
    assert not step.partial.exists()


def test_killed_before_any_act_it_loses_nothing(source: Path, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the move before its first, second, … act; each time a complete copy is there and the next run ends it."""
    acts = 0
    for survived in range(20):
        for folder in (source, source.parent, volume / "cache"):
            if folder.is_symlink():
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
        held = fill(source)
        step = move(source, volume)
        left = survived

        def kill(act: str, **_: object) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt(act)
            left -= 1

        with monkeypatch.context() as patch:
            patch.setattr(step.journal, "record", kill)
            try:
                step.apply()
                ended = True
            except KeyboardInterrupt:
                ended = False
        places = [read(place) for place in (source, step.aside, step.target) if place.is_dir()]
        assert held in places, f"after {survived} acts no complete copy is left"
        move(source, volume).apply()
        assert move(source, volume).check().state is State.OK
        assert read(step.target) == held
        if ended:
            acts = survived
            break
    assert acts >= 2


def test_a_copy_that_was_cut_short_is_begun_again(source: Path, other_disk: Path) -> None:
    held = fill(source)
    step = move(source, other_disk)
    step.partial.mkdir(parents=True)
    (step.partial / "half").write_text("of an earlier copy")
    step.apply()
    assert read(step.target) == held


def test_a_file_that_changes_during_the_copy_stops_the_move(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source)
    step = move(source, other_disk)
    copytree = shutil.copytree

    def copy_then_write(original: Path, copy: Path, *, symlinks: bool) -> Path:
        monkeypatch.setattr(shutil, "copytree", copytree)  # it calls itself for every folder
        done = copytree(original, copy, symlinks=symlinks)
        (source / "hub/blobs/a").write_text("newer")
        return done

    monkeypatch.setattr(shutil, "copytree", copy_then_write)
    with pytest.raises(FirstlightError, match="Nothing was removed"):
        step.apply()
    assert (source / "hub/blobs/a").read_text() == "newer"
    monkeypatch.undo()
    step.apply()
    assert (step.target / "hub/blobs/a").read_text() == "newer"


def test_overlayfs_refuses_the_rename_and_it_is_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = fill(source)
    step = move(source, tmp_path / "volume")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == source and target == step.target:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    step.apply()
    assert read(step.target) == held


def test_a_foreign_link_is_left_alone(source: Path, volume: Path, tmp_path: Path) -> None:
    source.parent.mkdir(parents=True)
    source.symlink_to(tmp_path / "elsewhere")
    found = move(source, volume).check()
    assert found.state is State.BLOCKED
    assert str(tmp_path / "elsewhere") in found.detail


def test_a_file_in_the_way_is_left_alone(source: Path, volume: Path) -> None:
    source.parent.mkdir(parents=True)
    source.write_text("not a folder")
    assert move(source, volume).check().state is State.BLOCKED


def test_two_folders_with_unlike_files_are_left_to_a_person(source: Path, volume: Path) -> None:
    fill(source)
    step = move(source, volume)
    step.target.mkdir(parents=True)
    (step.target / "other").write_text("older")
    found = step.check()
    assert found.state is State.BLOCKED
    assert "diff -rq" in found.detail


def test_an_empty_folder_makes_way_for_the_link(source: Path, volume: Path) -> None:
    (source / "left/over").mkdir(parents=True)
    step = move(source, volume)
    step.target.mkdir(parents=True)
    (step.target / "kept").write_text("on the volume")
    step.apply()
    assert (source / "kept").read_text() == "on the volume"


def test_too_little_space_is_told_with_the_bytes(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = fill(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(BlockedError, match="0 bytes are free"):
        move(source, other_disk).apply()
    assert read(source) == held


def test_the_journal_names_each_act_before_it(source: Path, other_disk: Path) -> None:
    fill(source)
    step = move(source, other_disk)
    step.apply()
    assert step.journal.path is not None
    acts = [line.split('"act": "')[1].split('"')[0] for line in step.journal.path.read_text().splitlines()[1:]]
    assert acts == ["copy", "aside", "link", "drop"]
