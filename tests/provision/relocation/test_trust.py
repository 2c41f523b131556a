"""Other users and other programs: nobody's link is followed, nobody's folder is used, who is at work is named."""

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
from tests.provision.folder_moves import moving, refuse, target

if TYPE_CHECKING:
    from collections.abc import Callable


def test_who_uses_the_folder_is_named(source: Path, volume: Path) -> None:
    (source / "deep").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=source / "deep", stdin=subprocess.PIPE) as user:
        with pytest.raises(BlockedError, match=rf"pid {user.pid} .*uses {source}/deep"):
            moving(source, volume).apply()
        assert not source.is_symlink()
        user.communicate(b"\n")
    (source / "open").write_text("x")
    code = f"f = open({str(source / 'open')!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        user.stdout.readline()
        with pytest.raises(BlockedError, match=rf"pid {user.pid} .*uses {source}/open"):
            moving(source, volume).apply()
        user.communicate(b"\n")
    moving(source, volume).apply()
    assert source.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's link")
def test_a_link_that_another_user_planted_is_not_followed(home: Path, volume: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    (home / ".cache").symlink_to(trap)
    os.lchown(home / ".cache", 12345, 12345)
    with pytest.raises(BlockedError, match=r"\.cache is a link that user 12345 made"):
        moving(home / ".cache/hub", volume).apply()
    assert list(trap.iterdir()) == []
    os.lchown(home / ".cache", 0, 0)
    moving(home / ".cache/hub", volume).apply()
    assert (trap / "hub").is_symlink()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=random_trees.NAMES, at=st.integers(0, 3))
def test_a_link_planted_between_look_and_act_is_not_followed(
    home: Path, other_disk: Path, tmp_path: Path, name: bytes, at: int
) -> None:
    """At the nth opening of a folder, one of the folders becomes a link to somewhere else."""
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
    enter, seen = OpenDir.enter, 0

    def plant(self: OpenDir, inner: str) -> OpenDir:
        nonlocal seen
        if os.fsencode(inner) == name:
            if seen == at:
                shutil.rmtree(self.path / inner)
                (self.path / inner).symlink_to(outside)
            seen += 1
        return enter(self, inner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenDir, "enter", plant)
        with contextlib.suppress(OSError, FirstlightError):
            moving(source, other_disk).apply()
    assert (outside / "precious").read_text() == "not yours"
    assert [path.name for path in outside.iterdir()] == ["precious"]
    copied = [path for path in (other_disk / "cache").rglob("precious") if "outside" not in str(path.resolve())]
    assert copied == []


def test_a_parent_where_everybody_may_rename_is_refused(source: Path, volume: Path) -> None:
    source.mkdir(parents=True)
    source.parent.chmod(0o777)
    with pytest.raises(BlockedError, match="chmod o-w"):
        moving(source, volume).apply()
    source.parent.chmod(0o1777)
    moving(source, volume).apply()
    assert source.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_a_stage_that_another_user_has_laid_is_not_used(source: Path, other_disk: Path) -> None:
    """Volumes are often writable for everybody: the place is taken, but nothing of somebody else's is written into."""
    source.mkdir(parents=True)
    held = random_trees.small(source)
    step = moving(source, other_disk)
    laid = target(step).with_name(".hub.firstlight-partial")
    laid.mkdir(parents=True)
    laid.parent.chmod(0o777)
    os.chown(laid, 12345, 12345)
    with pytest.raises(BlockedError, match="belongs to another user"):
        step.apply()
    assert list(laid.iterdir()) == []
    laid.rmdir()
    step.apply()
    assert random_trees.read(target(step)) == held


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_parent_that_is_not_ours_to_write(other_disk: Path) -> None:
    """The folder is ours, the one it lies in is not: it can be neither renamed nor replaced."""
    other_disk.chmod(0o755)
    theirs, volume = other_disk / "theirs", other_disk / "volume"
    (theirs / "cache").mkdir(parents=True)
    (theirs / "cache/model").write_text("weights")
    volume.mkdir()
    for path in (theirs / "cache", theirs / "cache/model", volume):
        os.chown(path, 12345, 12345)

    def act() -> None:
        step = moving(theirs / "cache", volume, "HF_HUB_CACHE")
        assert step.check().state is State.DRIFTED
        step.apply()
        found = step.check()
        assert found.state is State.OK
        assert "cannot be written" in (found.fallback or "")
        assert (target(step) / "model").read_text() == "weights"
        assert (theirs / "cache/model").read_text() == "weights"
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
                patch.setattr(OpenDir, "exchange", refuse(errno.EXDEV))
                patch.setattr(OpenDir, "rename", renaming_nothing_out_of(volume))
                act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def renaming_nothing_out_of(folder: Path) -> Callable[..., None]:
    rename = OpenDir.rename

    def renaming(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        if self.path == folder and other.path != folder:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(self, name, other, new)

    return renaming


def test_a_file_that_becomes_a_link_is_not_read_through(
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

    def copying(from_: int, *rest: Any, **named: Any) -> bool:
        assert os.fstat(from_).st_ino != precious.stat().st_ino
        return copy(from_, *rest, **named)

    monkeypatch.setattr(OpenDir, "open", plant)
    monkeypatch.setattr(copy_file, "copy", copying)
    step = moving(source, other_disk)
    step.apply()
    assert (target(step) / "mine").readlink() == precious, "it is moved as the link that it has become"
