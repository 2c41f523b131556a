"""Tests folder moves with provoked faults: no data is lost, and the error has the reason."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import BlockedError, FirstlightError
from provision.core.layout import Root
from provision.core.step import State
from provision.fs.copy_tree import TreeCopy
from provision.fs.open_dir import OpenDir
from provision.host.tool_caches import RelocatedFolder
from provision.relocation import preflight
from provision.relocation.step import RelocateStep
from provision.volume import variables
from provision.volume.journal import Journal
from tests.provision import random_trees
from tests.provision.folder_moves import leftovers, raise_errno, relocation_step, target

if TYPE_CHECKING:
    from pathlib import Path


def test_file_that_changes_during_the_copy_is_copied_again(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.mkdir(parents=True)
    random_trees.small(source)
    copy_changes = TreeCopy.copy_changes
    copies = 0

    def copy_then_write(self: TreeCopy) -> list[str]:
        nonlocal copies
        copies += 1
        changed = copy_changes(self)
        if copies == 1:
            (source / "blobs/b").write_text("grown while it was copied")
            (source / "blobs/late").write_text("new while it was copied")
            (source / "blobs/deep/c").unlink()
            (source / "link").replace(source / "renamed")
        return changed

    monkeypatch.setattr(TreeCopy, "copy_changes", copy_then_write)
    step = relocation_step(source, other_disk)
    step.apply()
    assert copies >= 2
    assert (source / "blobs/b").read_text() == "grown while it was copied"
    assert (source / "blobs/deep/b too").read_text() == "grown while it was copied"
    assert (source / "blobs/late").exists()
    assert not (source / "blobs/deep/c").exists()
    assert (source / "renamed").is_symlink()
    assert not (source / "link").is_symlink()


def test_file_that_keeps_changing_blocks_the_move(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.mkdir(parents=True)
    random_trees.small(source)
    copy_changes = TreeCopy.copy_changes

    def copy_then_write(self: TreeCopy) -> list[str]:
        changed = copy_changes(self)
        with (source / "blobs/b").open("a") as file:
            file.write("more")
        return changed

    monkeypatch.setattr(TreeCopy, "copy_changes", copy_then_write)
    with pytest.raises(BlockedError, match=r"blobs/.* keeps changing"):
        relocation_step(source, other_disk).apply()
    assert not source.is_symlink()


@pytest.mark.parametrize("merge", [False, True], ids=["copy", "merge"])
def test_file_written_just_before_the_folder_is_replaced_by_a_link_is_kept(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch, merge: bool
) -> None:
    source.mkdir(parents=True)
    random_trees.small(source)
    if merge:
        (Root(other_disk).hub / "kept").mkdir(parents=True)
        (Root(other_disk).hub / "kept/file").write_text("of the volume")
    exchange = OpenDir.exchange

    def write_then_exchange(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        (source / "blobs/b").write_text("at the last moment")
        (source / "blobs/new").write_text("at the last moment")
        exchange(self, name, other, new)

    monkeypatch.setattr(OpenDir, "exchange", write_then_exchange)
    step = relocation_step(source, other_disk)
    step.apply()
    assert (source / "blobs/b").read_text() == "at the last moment"
    assert (source / "blobs/new").read_text() == "at the last moment"
    assert step.check().state is State.OK


@pytest.mark.parametrize("is_newest", [True, False])
def test_file_that_another_host_saves_during_a_merge_is_kept(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch, is_newest: bool
) -> None:
    """A host of the same volume saves one new file and one present file while this host's folder is copied."""
    hub = Root(other_disk).hub
    for folder, time in ((source, 10), (hub, 5)):
        folder.mkdir(parents=True)
        for name in ("new", "both") if folder == source else ("both", "kept"):
            (folder / name).write_text(f"of the {'home' if folder == source else 'volume'}")
            os.utime(folder / name, (time, time))
    step, copy, copies = relocation_step(source, other_disk), TreeCopy.run, 0

    def save_then_copy(self: TreeCopy) -> None:
        nonlocal copies
        copies += 1
        if copies == 1:
            for name in ("new", "both"):
                (hub / name).write_text("of the other host")
                os.utime(hub / name, (20, 20) if is_newest else (7, 7))
        copy(self)

    monkeypatch.setattr(TreeCopy, "run", save_then_copy)
    step.apply()
    assert step.check().state is State.OK
    expected = "of the other host" if is_newest else "of the home"
    assert {(source / name).read_text() for name in ("new", "both")} == {expected}
    texts = sorted(file.read_text() for file in source.iterdir())
    assert texts == ["of the home"] * 2 + ["of the other host"] * 2 + ["of the volume"]


def test_file_that_another_host_makes_at_the_last_moment_is_never_replaced(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Root(other_disk).hub
    source.mkdir(parents=True)
    hub.mkdir(parents=True)
    (source / "notes").write_text("of this home")
    (hub / "kept").write_text("of the volume")
    step, rename = relocation_step(source, other_disk), OpenDir.rename_exclusive

    def save_then_rename(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        (other.path / new).write_text("of the other host")
        rename(self, name, other, new)

    with monkeypatch.context() as patched:
        patched.setattr(OpenDir, "rename_exclusive", save_then_rename)
        with pytest.raises(BlockedError, match="was made during the merge"):
            step.apply()
    assert (hub / "notes").read_text() == "of the other host"
    assert (source / "notes").read_text() == "of this home"
    step.apply()
    assert sorted(file.read_text() for file in source.iterdir()) == [
        "of the other host",
        "of the volume",
        "of this home",
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file leases are Linux calls")
@pytest.mark.parametrize("merge", [False, True], ids=["copy", "merge"])
def test_file_that_a_hidden_process_writes_blocks_the_move(source: Path, other_disk: Path, merge: bool) -> None:
    """This process stands for one of another container: /proc does not show that one, and a move leaves out its own."""
    source.mkdir(parents=True)
    random_trees.small(source)
    if merge:
        (Root(other_disk).hub / "kept").mkdir(parents=True)
        (Root(other_disk).hub / "kept/file").write_text("of the volume")
    step = relocation_step(source, other_disk)
    with (source / "blobs/b").open("a") as log:
        with pytest.raises(BlockedError, match="blobs/b is open for writing"):
            step.apply()
        log.write("a line after the refusal")
    assert not source.is_symlink()
    step.apply()
    assert (source / "blobs/b").read_bytes().endswith(b"a line after the refusal")


def test_copy_with_changed_bytes_is_rejected_and_the_source_stays(
    source: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Change four bytes of a copied file and keep its times, as a faulty disk may do."""
    source.mkdir(parents=True)
    before = random_trees.small(source)
    copy_file = TreeCopy._file

    def copy_wrongly(self: TreeCopy, original: OpenDir, copy: OpenDir, name: str) -> None:
        copy_file(self, original, copy, name)
        if name == "a":
            before = (copy.path / name).stat()
            with (copy.path / name).open("r+b") as file:
                file.seek(2_400_000)
                file.write(b"\0\1\2\3")
            os.utime(copy.path / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(TreeCopy, "_file", copy_wrongly)
    with pytest.raises(FirstlightError, match="still differs from its original"):
        relocation_step(source, other_disk).apply()
    assert random_trees.read(source) == before


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV])
def test_folder_is_moved_by_rename_where_the_exchange_of_two_names_is_not_supported(
    source: Path, volume: Path, home: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    source.mkdir(parents=True)
    before = random_trees.fill(source)
    monkeypatch.setattr(OpenDir, "exchange", raise_errno(code))
    step = relocation_step(source, volume)
    step.apply()
    assert step.check().state is State.OK
    assert random_trees.read(target(step)) == before
    assert leftovers(home, volume) == []


def test_folder_that_cannot_be_renamed_is_copied_and_then_emptied(
    source: Path, volume: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Move a folder of an image layer, which overlayfs does not rename (EXDEV)."""
    source.mkdir(parents=True)
    before = random_trees.fill(source)
    rename = OpenDir.rename

    def rename_elsewhere(self: OpenDir, name: str, other: OpenDir, new: str) -> None:
        if name == "hub" and self.path == source.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(self, name, other, new)

    monkeypatch.setattr(OpenDir, "exchange", raise_errno(errno.EXDEV))
    monkeypatch.setattr(OpenDir, "rename", rename_elsewhere)
    step = relocation_step(source, volume)
    step.apply()
    assert step.check().state is State.OK
    assert random_trees.read(target(step)) == before
    assert leftovers(home, volume) == []


@pytest.mark.parametrize("place", ["overlay", "other disk"])
def test_folder_of_the_lower_layer_of_an_overlayfs_is_moved(overlay: Path, other_disk: Path, place: str) -> None:
    source = overlay / "miniconda3/envs"
    with pytest.raises(OSError, match="cross-device"):
        source.rename(overlay / "elsewhere")
    step = relocation_step(source, overlay / "data" if place == "overlay" else other_disk)
    step.apply()
    assert step.check().state is State.OK
    assert source.is_symlink()
    assert (source / "e/python").read_text() == "of the image"


def test_move_to_a_disk_with_too_little_space_is_blocked_before_the_copy(source: Path, small_disk: Path) -> None:
    source.mkdir(parents=True)
    (source / "weights").write_bytes(os.urandom(9 << 20))
    with pytest.raises(BlockedError, match=r"bytes are free and 9,\d{3},\d{3}|bytes are free and 10,\d{3},\d{3}"):
        relocation_step(source, small_disk).apply()
    assert (source / "weights").stat().st_size == 9 << 20
    assert leftovers(small_disk) == [] or not any((small_disk / "cache").rglob("weights"))


def test_move_to_a_disk_with_too_few_inodes_is_blocked_before_the_copy(source: Path, small_disk: Path) -> None:
    source.mkdir(parents=True)
    for number in range(100):
        (source / str(number)).touch()
    with pytest.raises(BlockedError, match="inodes are free"):
        relocation_step(source, small_disk).apply()
    assert len(list(source.iterdir())) == 100


def test_unfinished_copy_is_deleted_when_the_disk_is_full(
    source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.mkdir(parents=True)
    before = {str(number): os.urandom(1 << 20) for number in range(6)}
    for name, content in before.items():
        (source / name).write_bytes(content)
    step = relocation_step(source, small_disk)
    copy_file = TreeCopy._file

    def copy_then_fill(self: TreeCopy, original: OpenDir, copy: OpenDir, name: str) -> None:
        copy_file(self, original, copy, name)
        with (small_disk / "other data").open("wb") as file:
            while file.write(b"x" * 65536):
                pass

    monkeypatch.setattr(TreeCopy, "_file", copy_then_fill)
    with pytest.raises(OSError, match="No space left"):
        step.apply()
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert leftovers(small_disk) == []
    (small_disk / "other data").unlink()
    monkeypatch.undo()
    os.environ["HOME"] = str(step.home)
    step.apply()
    assert {path.name: path.read_bytes() for path in target(step).iterdir()} == before


def test_move_to_a_read_only_volume_fails_and_leaves_the_source_unchanged(source: Path, small_disk: Path) -> None:
    source.mkdir(parents=True)
    (source / "file").write_text("x")
    step = relocation_step(source, small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        step.apply()
    assert (source / "file").read_text() == "x"


def test_mount_point_inside_the_folder_blocks_the_move(source: Path, volume: Path, tmp_path: Path) -> None:
    inner = source / "inner mount"
    inner.mkdir(parents=True)
    completed = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inner], check=False, capture_output=True)
    if completed.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        with pytest.raises(BlockedError, match="inner mount is a mount inside"):
            relocation_step(source, volume).apply()
    finally:
        subprocess.run(["umount", inner], check=True)


def test_folders_that_are_nested_too_deeply_are_refused(source: Path, other_disk: Path) -> None:
    source.mkdir(parents=True)
    deep = os.open(source, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=deep)
        deep, above = os.open("d", os.O_RDONLY, dir_fd=deep), deep
        os.close(above)
    os.close(deep)
    try:
        with pytest.raises(BlockedError, match="nested too deeply"):
            relocation_step(source, other_disk).apply()
        assert not source.is_symlink()
    finally:
        subprocess.run(["rm", "-r", source], check=True)  # shutil.rmtree cannot follow it either


def test_root_inside_the_relocated_folder_is_rejected(source: Path) -> None:
    (source / "data").mkdir(parents=True)
    step = relocation_step(source, source / "data")
    with pytest.raises(BlockedError, match="lies inside"):
        step.apply()


def test_folder_that_is_a_mount_point_is_relocated_by_an_environment_variable(source: Path, volume: Path) -> None:
    """Relocate a mount point, which can be neither renamed nor removed."""
    source.mkdir(parents=True)
    completed = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", source], check=False, capture_output=True)
    if completed.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        (source / "model").write_text("weights")
        assert relocation_step(source, volume).check().state is State.BLOCKED
        step = relocation_step(source, volume, "HF_HUB_CACHE")
        assert step.check().state is State.DRIFTED
        step.apply()
        check = step.check()
        assert check.state is State.OK
        assert check.fallback
        assert f"HF_HUB_CACHE={target(step)}" in check.fallback
        assert (target(step) / "model").read_text() == "weights"
        assert variables.read(step.root) == {"HF_HUB_CACHE": str(target(step))}
        for shell in ("sh", "bash"):
            script = f". '{variables.shell_file(step.root)}'; printf %s \"$HF_HUB_CACHE\""
            assert subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True).stdout == str(
                target(step)
            )
    finally:
        subprocess.run(["umount", source], check=True)


def test_300_wrong_links_are_corrected_with_at_most_100_open_files(home: Path, tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    places = [RelocatedFolder(home / f"{number}", root.path / f"{number}") for number in range(300)]
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


def test_unfinished_copy_is_deleted_when_inodes_run_out(
    source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.mkdir(parents=True)
    for number in range(100):
        (source / str(number)).touch()
    step = relocation_step(source, small_disk)
    monkeypatch.setattr(preflight, "require_space", lambda *_: None)
    with pytest.raises(OSError, match="No space left"):
        step.apply()
    assert len(list(source.iterdir())) == 100
    assert leftovers(small_disk) == []
