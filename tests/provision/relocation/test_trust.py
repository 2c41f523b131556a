"""Tests folder moves against other users and programs: links and folders that others made are not used."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provision.core.errors import BlockedError, FirstlightError
from provision.core.layout import Root
from provision.core.step import State
from provision.fs import copy_file
from provision.fs.open_dir import OpenDir
from provision.host.tool_caches import RelocatedFolder
from provision.relocation.step import RelocateStep
from provision.volume.journal import Journal
from tests.provision import random_trees
from tests.provision.folder_moves import raise_errno, relocation_step, target

if TYPE_CHECKING:
    from collections.abc import Callable


def test_process_that_uses_the_folder_blocks_the_move(source: Path, volume: Path) -> None:
    (source / "deep").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=source / "deep", stdin=subprocess.PIPE) as process:
        with pytest.raises(BlockedError, match=rf"pid {process.pid} .*uses {source}/deep"):
            relocation_step(source, volume).apply()
        assert not source.is_symlink()
        process.communicate(b"\n")
    (source / "open").write_text("x")
    code = f"f = open({str(source / 'open')!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(BlockedError, match=rf"pid {process.pid} .*uses {source}/open"):
            relocation_step(source, volume).apply()
        process.communicate(b"\n")
    relocation_step(source, volume).apply()
    assert source.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's link")
def test_link_of_another_user_in_the_path_of_the_folder_blocks_the_move(
    home: Path, volume: Path, tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    (home / ".cache").symlink_to(trap)
    os.lchown(home / ".cache", 12345, 12345)
    with pytest.raises(BlockedError, match=r"\.cache is a link that user 12345 made"):
        relocation_step(home / ".cache/hub", volume).apply()
    assert list(trap.iterdir()) == []
    os.lchown(home / ".cache", 0, 0)
    relocation_step(home / ".cache/hub", volume).apply()
    assert (trap / "hub").is_symlink()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=random_trees.NAMES, number=st.integers(0, 3))
def test_link_that_replaces_a_folder_during_the_move_is_not_followed(
    home: Path, other_disk: Path, tmp_path: Path, name: bytes, number: int
) -> None:
    """Replace a folder by a link to another folder just before the folder is opened for the nth time."""
    outside, source = tmp_path / "outside", home / "planted"
    for folder in (outside, source):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(other_disk / "cache", ignore_errors=True)
    source.unlink(missing_ok=True)
    victim = Path(os.fsdecode(os.fsencode(source) + b"/" + name))
    victim.mkdir(parents=True)
    (victim / "mine").write_text("mine")
    outside.mkdir()
    (outside / "precious").write_text("not yours")
    enter, calls = OpenDir.enter, 0

    def plant(self: OpenDir, inner: str) -> OpenDir:
        nonlocal calls
        if os.fsencode(inner) == name:
            if calls == number:
                shutil.rmtree(self.path / inner)
                (self.path / inner).symlink_to(outside)
            calls += 1
        return enter(self, inner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenDir, "enter", plant)
        with contextlib.suppress(OSError, FirstlightError):
            relocation_step(source, other_disk).apply()
    assert (outside / "precious").read_text() == "not yours"
    assert [path.name for path in outside.iterdir()] == ["precious"]
    copied = [path for path in (other_disk / "cache").rglob("precious") if "outside" not in str(path.resolve())]
    assert copied == []


def test_parent_folder_in_which_every_user_may_rename_entries_blocks_the_move(source: Path, volume: Path) -> None:
    source.mkdir(parents=True)
    source.parent.chmod(0o777)
    with pytest.raises(BlockedError, match="chmod o-w"):
        relocation_step(source, volume).apply()
    source.parent.chmod(0o1777)
    relocation_step(source, volume).apply()
    assert source.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_folder_of_another_user_in_the_place_of_the_partial_copy_blocks_the_move(
    source: Path, other_disk: Path
) -> None:
    """Make the folder of the partial copy as another user, because volumes are often writable for every user."""
    source.mkdir(parents=True)
    before = random_trees.small(source)
    step = relocation_step(source, other_disk)
    partial = target(step).with_name(".hub.firstlight-partial")
    partial.mkdir(parents=True)
    partial.parent.chmod(0o777)
    os.chown(partial, 12345, 12345)
    with pytest.raises(BlockedError, match="belongs to another user"):
        step.apply()
    assert list(partial.iterdir()) == []
    partial.rmdir()
    step.apply()
    assert random_trees.read(target(step)) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folder_below_an_unwritable_parent_is_relocated_by_an_environment_variable(other_disk: Path) -> None:
    """Relocate a folder that can be neither renamed nor replaced, because its parent belongs to another user."""
    other_disk.chmod(0o755)
    foreign_folder, volume = other_disk / "theirs", other_disk / "volume"
    (foreign_folder / "cache").mkdir(parents=True)
    (foreign_folder / "cache/model").write_text("weights")
    volume.mkdir()
    for path in (foreign_folder / "cache", foreign_folder / "cache/model", volume):
        os.chown(path, 12345, 12345)

    def relocate_as_other_user() -> None:
        step = relocation_step(foreign_folder / "cache", volume, "HF_HUB_CACHE")
        assert step.check().state is State.DRIFTED
        step.apply()
        check = step.check()
        assert check.state is State.OK
        assert "is not writable" in (check.fallback or "")
        assert (target(step) / "model").read_text() == "weights"
        assert (foreign_folder / "cache/model").read_text() == "weights"
        with pytest.raises(BlockedError, match="belongs to another user"):
            foreign.apply()

    (volume / "own").mkdir()
    (volume / "own/not mine").touch()
    os.chown(volume / "own", 12345, 12345)
    root = Root(other_disk / "second")
    foreign = RelocateStep(
        "x", [RelocatedFolder(volume / "own", root.path / "x")], root, volume, Journal(Root(volume).journal)
    )
    root.path.mkdir()
    os.chown(root.path, 12345, 12345)
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(12345)
            os.setuid(12345)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(OpenDir, "exchange", raise_errno(errno.EXDEV))
                patch.setattr(OpenDir, "rename", refuse_rename_out_of(volume))
                relocate_as_other_user()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def refuse_rename_out_of(folder: Path) -> Callable[..., None]:
    """Return a replacement of OpenDir.rename that fails with EXDEV for a rename from `folder` into another one."""
    rename = OpenDir.rename

    def rename_within(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        if self.path == folder and other.path != folder:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(self, name, other, new)

    return rename_within


def test_file_that_is_replaced_by_a_link_during_the_move_is_not_read_through_the_link(
    source: Path, other_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.mkdir(parents=True)
    (source / "mine").write_text("mine")
    precious = tmp_path / "precious"
    precious.write_text("not yours")
    opened = OpenDir.open

    def plant(self: OpenDir, name: str, flags: int, mode: int = 0o600) -> int:
        if name == "mine" and self.path == source and not (source / "mine").is_symlink():
            (source / "mine").unlink()
            (source / "mine").symlink_to(precious)
        return opened(self, name, flags, mode)

    copy = copy_file.copy

    def check_then_copy(from_: int, *rest: Any, **named: Any) -> bool:
        assert os.fstat(from_).st_ino != precious.stat().st_ino
        return copy(from_, *rest, **named)

    monkeypatch.setattr(OpenDir, "open", plant)
    monkeypatch.setattr(copy_file, "copy", check_then_copy)
    step = relocation_step(source, other_disk)
    step.apply()
    assert (target(step) / "mine").readlink() == precious, "the link itself is moved"
