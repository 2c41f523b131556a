"""Tests relocation, merge and undo on volumes that keep less than the home: times, modes, owners, links and names."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from provision.core.layout import Root
from provision.fs import capabilities
from provision.volume import volume_capabilities
from tests.provision.run_command import provision

Limited = Callable[..., Path]

# Each limit, or set of limits, of a network volume to which a folder can be relocated.
VOLUMES = [
    ["seconds"],
    ["two-seconds"],
    ["100ns"],
    ["no-times"],
    ["fixed-modes"],
    ["no-chmod"],
    ["owner"],
    ["no-xattr"],
    ["no-hardlink"],
    ["no-exchange"],
    ["no-exec"],
    ["no-flock"],
    ["no-fsync"],
    ["fixed-modes", "owner", "two-seconds", "no-xattr", "no-hardlink", "no-exchange", "no-exec"],
]
# The library filelock warns when it falls back to another kind of lock.
pytestmark = pytest.mark.filterwarnings("ignore:flock not supported:UserWarning")
EACH_VOLUME = pytest.mark.parametrize("limits", VOLUMES, ids=[" ".join(limits) for limits in VOLUMES])


def fill(folder: Path) -> dict[str, bytes]:
    """Make files with unusual times, modes, an owner, an attribute and a hard link; return {relative path: bytes}."""
    (folder / "deep/er").mkdir(parents=True)
    (folder / "a").write_bytes(os.urandom(1_500_000))
    (folder / "deep/script").write_text("#!/bin/sh\n")
    (folder / "deep/script").chmod(0o755)
    (folder / "deep/er/private").write_text("secret")
    (folder / "deep/er/private").chmod(0o600)
    os.link(folder / "a", folder / "deep/same as a")
    os.setxattr(folder / "a", "user.note", b"mine")
    os.chown(folder / "deep/script", 12345, 12345)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, ns=(10**18, 1_600_000_001_123_456_789 + number * 700_000_001))
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metadata(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return {relative path: (mode, owner, modification time in ns)} of a tree."""
    paths = [folder, *folder.rglob("*")]
    statuses = {str(path.relative_to(folder)): path.lstat() for path in paths}
    return {path: (status.st_mode, status.st_uid, status.st_mtime_ns) for path, status in statuses.items()}


def relocate(folder: Path, volume: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return provision("relocate", folder, "--to", "moved", "--root", volume, *more)


@EACH_VOLUME
def test_folder_is_relocated_to_a_volume_with_limits_and_brought_back_by_undo(
    home: Path, limited: Limited, limits: list[str]
) -> None:
    volume = limited(*limits)
    before = fill(home / "data")
    completed = relocate(home / "data", volume)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert (home / "data").is_symlink()
    assert contents(volume / "moved") == before
    again = relocate(home / "data", volume)
    assert again.returncode == 0
    undone = provision("undo", "--root", volume)
    assert undone.returncode == 0, undone.stdout + undone.stderr
    assert not (home / "data").is_symlink()
    assert contents(home / "data") == before
    assert not (volume / "moved").exists()


@EACH_VOLUME
def test_folder_is_merged_with_one_on_a_volume_with_limits_and_separated_by_undo(
    home: Path, limited: Limited, limits: list[str]
) -> None:
    volume = limited(*limits)
    before = fill(home / "data")
    modes = {path: mode for path, (mode, _, _) in metadata(home / "data").items() if path != "."}
    (volume / "moved/deep").mkdir(parents=True)
    (volume / "moved/deep/script").write_text("the volume's own")
    os.utime(volume / "moved/deep/script", (0, 0))
    (volume / "moved/other").write_text("the volume's own")
    completed = relocate(home / "data", volume)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    merged = contents(volume / "moved")
    assert {*before.values(), b"the volume's own"} == set(merged.values())
    undone = provision("undo", "--root", volume)
    assert undone.returncode == 0, undone.stdout + undone.stderr
    assert contents(home / "data") == before
    assert {path: mode for path, (mode, _, _) in metadata(home / "data").items() if path != "."} == modes
    assert contents(volume / "moved") == {"deep/script": b"the volume's own", "other": b"the volume's own"}


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ("fixed-modes", "modes (every user may be able to read a private file)"),
        ("owner", "owners"),
        ("no-xattr", "extended attributes"),
        ("no-times", "modification times"),
        ("seconds", "modification times finer than 1 s"),
    ],
)
def test_metadata_that_the_volume_does_not_keep_is_reported_by_the_first_relocation_only(
    home: Path, limited: Limited, limit: str, text: str
) -> None:
    volume = limited(limit)
    fill(home / "data")
    completed = relocate(home / "data", volume)
    assert completed.stdout.count(f"the moved files lose what {volume} does not keep: {text}") >= 1
    assert "does not keep" not in relocate(home / "data", volume).stdout


def test_relocation_to_a_volume_without_limits_keeps_all_metadata(home: Path, limited: Limited) -> None:
    volume = limited()
    fill(home / "data")
    before = metadata(home / "data")
    assert relocate(home / "data", volume).returncode == 0
    assert metadata(volume / "moved") == before
    assert os.getxattr(volume / "moved/a", "user.note") == b"mine"
    assert (volume / "moved/a").stat().st_nlink == 2


def test_undo_from_a_volume_with_fixed_modes_gives_other_users_no_access_to_the_files(
    home: Path, limited: Limited
) -> None:
    volume = limited("fixed-modes", "owner")
    fill(home / "data")
    assert relocate(home / "data", volume).returncode == 0
    assert provision("undo", "--root", volume).returncode == 0
    for path, (mode, owner, _) in metadata(home / "data").items():
        assert not mode & (stat.S_IRWXG | stat.S_IRWXO), path
        assert owner == os.geteuid(), path


@pytest.mark.parametrize("is_merge", [False, True], ids=["copy", "merge"])
def test_folder_with_a_link_is_not_relocated_to_a_volume_that_cannot_store_links(
    home: Path, limited: Limited, is_merge: bool
) -> None:
    volume = limited("no-symlink")
    fill(home / "data")
    (home / "data/deep/link").symlink_to("script")
    if is_merge:
        (volume / "moved").mkdir()
        (volume / "moved/other").write_text("of the volume")
    before = contents(volume)
    completed = relocate(home / "data", volume)
    assert completed.returncode == 4
    assert f"{home}/data/deep/link is a symbolic link, and {volume} cannot store links." in completed.stdout
    assert not (home / "data").is_symlink()
    own = {path: text for path, text in contents(volume).items() if not path.startswith(".firstlight/")}
    assert own == before


def test_folder_without_links_is_relocated_to_a_volume_without_links(home: Path, limited: Limited) -> None:
    volume = limited("no-symlink")
    before = fill(home / "data")
    assert relocate(home / "data", volume).returncode == 0
    assert (home / "data").readlink() == volume / "moved"
    assert contents(home / "data") == before


def test_folder_with_names_that_differ_by_case_only_is_not_relocated_to_a_caseless_volume(
    home: Path, limited: Limited
) -> None:
    volume = limited("caseless")
    fill(home / "data")
    (home / "data/deep/Script").write_text("another file")
    completed = relocate(home / "data", volume)
    assert completed.returncode == 4
    assert "differ by case only" in completed.stdout
    assert not (volume / "moved").exists()
    (home / "data/deep/Script").unlink()
    assert relocate(home / "data", volume).returncode == 0


@pytest.mark.parametrize("inode_bytes", ["128", "256"])
def test_folder_is_relocated_to_ext4_with_small_or_large_inodes_and_brought_back(
    home: Path, tmp_path: Path, inode_bytes: str
) -> None:
    """Mount a real ext4 image; inodes of 128 bytes keep times in seconds."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed")
    image, volume = tmp_path / "image", tmp_path / "ext4"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    volume.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", "-I", inode_bytes, image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, volume], check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to mount an image")
    try:
        assert capabilities.probe(volume).mtime_ns == (10**9 if inode_bytes == "128" else 1)
        before = fill(home / "data")
        completed = relocate(home / "data", volume)
        assert completed.returncode == 0, completed.stdout + completed.stderr
        assert contents(volume / "moved") == before
        assert provision("undo", "--root", volume).returncode == 0
        assert contents(home / "data") == before
    finally:
        subprocess.run(["umount", volume], check=True)


def test_folder_is_relocated_to_a_real_ntfs_and_brought_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mount a real NTFS, which keeps times in units of 100 ns, and neither modes nor owners."""
    monkeypatch.setenv("FIRSTLIGHT_TRUST_VOLUME", "1")
    if not shutil.which("mkfs.ntfs") or not shutil.which("ntfs-3g"):
        pytest.skip("ntfs-3g is not installed")
    image, volume = tmp_path / "image", tmp_path / "ntfs"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    volume.mkdir()
    subprocess.run(["mkfs.ntfs", "--fast", "--force", "--quiet", image], check=True, capture_output=True)
    if subprocess.run(["ntfs-3g", image, volume], check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to mount an image")
    try:
        before = fill(home / "data")
        completed = relocate(home / "data", volume)
        assert completed.returncode == 0, completed.stdout + completed.stderr
        assert contents(volume / "moved") == before
        assert provision("undo", "--root", volume).returncode == 0
        assert contents(home / "data") == before
    finally:
        subprocess.run(["umount", volume], check=True)


def test_failed_copy_to_a_volume_with_times_in_seconds_is_resumed_without_copying_again(
    home: Path, limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    from provision.fs import copy_file
    from provision.fs.copy_tree import TreeCopy

    volume = limited("seconds")
    before = fill(home / "data")
    with monkeypatch.context() as patch:

        def fail(*_: object) -> list[str]:
            raise OSError(5, "Input/output error")

        patch.setattr(TreeCopy, "_verify", fail)
        assert relocate(home / "data", volume).returncode == 1
    copied: list[int] = []
    copy = copy_file.copy

    def count(source: int, *others: object, **options: object) -> bool:
        copied.append(source)
        return copy(source, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(copy_file, "copy", count)
    assert relocate(home / "data", volume).returncode == 0
    assert copied == []
    assert contents(volume / "moved") == before


def test_first_relocation_records_the_features_of_the_volume(home: Path, limited: Limited) -> None:
    volume = limited("seconds")
    fill(home / "data")
    assert relocate(home / "data", volume).returncode == 0
    can = volume_capabilities.recorded(Root(volume))
    assert can is not None
    assert can.mtime_ns == 10**9
