"""Everything that can go wrong in a move, provoked: nothing is lost, and the message says what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provision import variables
from provision.caches import Place
from provision.copying import Mirror
from provision.errors import BlockedError, FirstlightError
from provision.folder import Folder
from provision.journal import Journal
from provision.paths import Root
from provision.relocate import RelocateStep
from provision.step import State
from tests.provision import trees
from tests.provision.moves import leftovers, moving, refuse, target


def test_a_file_that_changes_during_the_copy_is_copied_again(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.mkdir(parents=True)
    trees.small(source)
    look = Mirror.look
    looks = 0

    def look_then_write(self: Mirror) -> list[str]:
        nonlocal looks
        looks += 1
        changed = look(self)
        if looks == 1:
            (source / "blobs/b").write_text("grown while it was copied")
            (source / "blobs/late").write_text("new while it was copied")
            (source / "blobs/deep/c").unlink()
            (source / "link").replace(source / "renamed")
        return changed

    monkeypatch.setattr(Mirror, "look", look_then_write)
    step = moving(source, other_disk)
    step.apply()
    assert looks >= 2
    assert (source / "blobs/b").read_text() == "grown while it was copied"
    assert (source / "blobs/deep/b too").read_text() == "grown while it was copied"
    assert (source / "blobs/late").exists()
    assert not (source / "blobs/deep/c").exists()
    assert (source / "renamed").is_symlink()
    assert not (source / "link").is_symlink()


def test_a_file_that_never_stands_still_stops_the_move(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.mkdir(parents=True)
    trees.small(source)
    look = Mirror.look

    def look_then_write(self: Mirror) -> list[str]:
        changed = look(self)
        with (source / "blobs/b").open("a") as file:
            file.write("more")
        return changed

    monkeypatch.setattr(Mirror, "look", look_then_write)
    with pytest.raises(BlockedError, match=r"blobs/.* keeps changing"):
        moving(source, other_disk).apply()
    assert not source.is_symlink()


def test_what_is_written_just_before_the_swap_is_not_lost(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.mkdir(parents=True)
    trees.small(source)
    exchange = Folder.exchange

    def write_then_exchange(self: Folder, name: str, other: Folder, new: str) -> None:
        (source / "blobs/b").write_text("at the last moment")
        (source / "blobs/new").write_text("at the last moment")
        exchange(self, name, other, new)

    monkeypatch.setattr(Folder, "exchange", write_then_exchange)
    step = moving(source, other_disk)
    step.apply()
    assert (source / "blobs/b").read_text() == "at the last moment"
    assert (source / "blobs/new").read_text() == "at the last moment"
    assert step.check().state is State.OK


def test_a_wrong_copy_is_never_taken(source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that gives back other bytes than it was given."""
    source.mkdir(parents=True)
    held = trees.small(source)
    copied = Mirror._file

    def harm(self: Mirror, original: Folder, copy: Folder, name: str) -> None:
        copied(self, original, copy, name)
        if name == "a":
            before = (copy.path / name).stat()
            with (copy.path / name).open("r+b") as file:
                file.seek(2_400_000)
                file.write(b"\0\1\2\3")
            os.utime(copy.path / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(Mirror, "_file", harm)
    with pytest.raises(FirstlightError, match="does not come out the same"):
        moving(source, other_disk).apply()
    assert trees.read(source) == held


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV])
def test_without_an_exchange_a_rename_does(
    source: Path, volume: Path, home: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    source.mkdir(parents=True)
    held = trees.fill(source)
    monkeypatch.setattr(Folder, "exchange", refuse(code))
    step = moving(source, volume)
    step.apply()
    assert step.check().state is State.OK
    assert trees.read(target(step)) == held
    assert leftovers(home, volume) == []


def test_where_no_rename_is_to_be_had_either(
    source: Path, volume: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As overlayfs answers for a folder of an image's layer: it is copied, and emptied where it is."""
    source.mkdir(parents=True)
    held = trees.fill(source)
    rename = Folder.rename

    def refused(self: Folder, name: str, other: Folder, new: str) -> None:
        if name == "hub" and self.path == source.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(self, name, other, new)

    monkeypatch.setattr(Folder, "exchange", refuse(errno.EXDEV))
    monkeypatch.setattr(Folder, "rename", refused)
    step = moving(source, volume)
    step.apply()
    assert step.check().state is State.OK
    assert trees.read(target(step)) == held
    assert leftovers(home, volume) == []


@pytest.mark.parametrize("place", ["same", "other"])
def test_a_folder_of_an_image_layer(overlay: Path, other_disk: Path, place: str) -> None:
    source = overlay / "miniconda3/envs"
    with pytest.raises(OSError, match="cross-device"):
        source.rename(overlay / "elsewhere")
    step = moving(source, overlay / "data" if place == "same" else other_disk)
    step.apply()
    assert step.check().state is State.OK
    assert source.is_symlink()
    assert (source / "e/python").read_text() == "of the image"


def test_too_little_room_is_told_before_anything_is_written(source: Path, small_disk: Path) -> None:
    source.mkdir(parents=True)
    (source / "weights").write_bytes(os.urandom(9 << 20))
    with pytest.raises(BlockedError, match=r"bytes are free and 9,\d{3},\d{3}|bytes are free and 10,\d{3},\d{3}"):
        moving(source, small_disk).apply()
    assert (source / "weights").stat().st_size == 9 << 20
    assert leftovers(small_disk) == [] or not any((small_disk / "cache").rglob("weights"))


def test_too_few_inodes_are_told(source: Path, small_disk: Path) -> None:
    source.mkdir(parents=True)
    for number in range(100):
        (source / str(number)).touch()
    with pytest.raises(BlockedError, match="inodes are free"):
        moving(source, small_disk).apply()
    assert len(list(source.iterdir())) == 100


def test_a_disk_that_fills_up_meanwhile_is_not_left_full(
    source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.mkdir(parents=True)
    held = {str(number): os.urandom(1 << 20) for number in range(6)}
    for name, content in held.items():
        (source / name).write_bytes(content)
    step = moving(source, small_disk)
    copied = Mirror._file

    def copy_then_fill(self: Mirror, original: Folder, copy: Folder, name: str) -> None:
        copied(self, original, copy, name)
        with (small_disk / "somebody else").open("wb") as file:
            while file.write(b"x" * 65536):
                pass

    monkeypatch.setattr(Mirror, "_file", copy_then_fill)
    with pytest.raises(OSError, match="No space left"):
        step.apply()
    assert {path.name: path.read_bytes() for path in source.iterdir()} == held
    assert leftovers(small_disk) == []
    (small_disk / "somebody else").unlink()
    monkeypatch.undo()
    os.environ["HOME"] = str(step.home)
    step.apply()
    assert {path.name: path.read_bytes() for path in target(step).iterdir()} == held


def test_a_read_only_volume(source: Path, small_disk: Path) -> None:
    source.mkdir(parents=True)
    (source / "file").write_text("x")
    step = moving(source, small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        step.apply()
    assert (source / "file").read_text() == "x"


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


def test_a_mount_inside_is_named(source: Path, volume: Path, tmp_path: Path) -> None:
    inner = source / "inner mount"
    inner.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inner], check=False, capture_output=True)
    if done.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        with pytest.raises(BlockedError, match="inner mount is a mount inside"):
            moving(source, volume).apply()
    finally:
        subprocess.run(["umount", inner], check=True)


def test_a_volume_inside_the_folder_is_refused(source: Path) -> None:
    (source / "data").mkdir(parents=True)
    found = moving(source, source / "data")
    with pytest.raises(BlockedError, match="lies inside"):
        found.apply()


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
@given(name=trees.NAMES, at=st.integers(0, 3))
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
    enter, seen = Folder.enter, 0

    def plant(self: Folder, inner: str) -> Folder:
        nonlocal seen
        if os.fsencode(inner) == name:
            if seen == at:
                shutil.rmtree(self.path / inner)
                (self.path / inner).symlink_to(outside)
            seen += 1
        return enter(self, inner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "enter", plant)
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


def test_where_no_link_can_be_a_variable_does_it(source: Path, volume: Path) -> None:
    """Something is mounted on the folder itself: it can be neither renamed nor removed."""
    source.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", source], check=False, capture_output=True)
    if done.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        (source / "model").write_text("weights")
        assert moving(source, volume).check().state is State.BLOCKED
        step = moving(source, volume, "HF_HUB_CACHE")
        assert step.check().state is State.DRIFTED
        step.apply()
        found = step.check()
        assert found.state is State.OK
        assert found.fallback
        assert f"HF_HUB_CACHE={target(step)}" in found.fallback
        assert (target(step) / "model").read_text() == "weights"
        assert variables.kept(step.root) == {"HF_HUB_CACHE": str(target(step))}
        for shell in ("sh", "bash"):
            code = f". '{step.root.variables}'; printf %s \"$HF_HUB_CACHE\""
            assert subprocess.run([shell, "-c", code], capture_output=True, text=True, check=True).stdout == str(
                target(step)
            )
    finally:
        subprocess.run(["umount", source], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_a_stage_that_another_user_has_laid_is_not_used(source: Path, other_disk: Path) -> None:
    """Volumes are often writable for everybody: the place is taken, but nothing of somebody else's is written into."""
    source.mkdir(parents=True)
    held = trees.small(source)
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
    assert trees.read(target(step)) == held


def test_many_links_that_lead_elsewhere_need_few_descriptors(home: Path, tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    places = [Place(home / f"{number}", root.path / f"{number}") for number in range(300)]
    for place in places:
        place.source.symlink_to(root.path / "elsewhere")
    step = RelocateStep("many", places, root, home, Journal(root.journal))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        step.apply()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert step.check().state is State.OK
