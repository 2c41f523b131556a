"""Tests the probe of a file system's features, on real mounts with limits, and their record beside the marker."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from provision.core.layout import Root
from provision.fs import capabilities
from provision.fs.capabilities import Capabilities
from provision.fs.kept_metadata import KeptMetadata
from provision.fs.mount import mount_of
from provision.volume import volume_capabilities
from provision.volume.journal import Journal
from provision.volume.marker import VolumeStep
from tests import limited_fs
from tests.provision.run_command import provision

Limited = Callable[..., Path]

FEATURE_OF_LIMIT: dict[str, tuple[str, object]] = {
    "no-symlink": ("symlink", False),
    "no-hardlink": ("hardlink", False),
    "no-exchange": ("exchange", False),
    "no-xattr": ("xattr", False),
    "no-flock": ("flock", False),
    "no-fsync": ("fsync", False),
    "no-exec": ("execute", False),
    "fixed-modes": ("modes", False),
    "no-chmod": ("chmod", False),
    "owner": ("owners", False),
    "seconds": ("mtime_ns", 10**9),
    "two-seconds": ("mtime_ns", 2 * 10**9),
    "100ns": ("mtime_ns", 100),
    "no-times": ("mtime_ns", 0),
    "caseless": ("case", False),
}


EVERY_FEATURE = replace(
    Capabilities(**{item.name: True for item in fields(Capabilities) if item.name != "mtime_ns"}), mtime_ns=1
)


def marked_root(folder: Path) -> Root:
    """Make a root with its marker in a folder, and return the root."""
    root = Root(folder / "root")
    VolumeStep(root, [], Journal(root.journal)).apply()
    return root


def test_table_of_expected_features_has_every_limit_of_limited_fs() -> None:
    assert set(FEATURE_OF_LIMIT) == set(limited_fs.LIMITS)


def test_probe_of_a_mount_without_limits_finds_every_feature(limited: Limited) -> None:
    tested = asdict(capabilities.probe(limited()))
    assert tested == asdict(EVERY_FEATURE)


@pytest.mark.parametrize("limit", FEATURE_OF_LIMIT)
def test_probe_of_a_mount_with_one_limit_finds_that_limit_and_no_other(limited: Limited, limit: str) -> None:
    folder = limited(limit)
    tested = asdict(capabilities.probe(folder))
    feature, value = FEATURE_OF_LIMIT[limit]
    expected = asdict(EVERY_FEATURE) | {feature: value}
    if limit == "no-chmod":
        expected["modes"] = False
    assert tested == expected
    assert list(folder.iterdir()) == []


def test_probe_of_ntfs_finds_fixed_modes_and_times_in_units_of_100_ns(tmp_path: Path) -> None:
    """Mount a real NTFS without the option `permissions`, so that its modes and owners are fixed."""
    if not shutil.which("mkfs.ntfs") or not shutil.which("ntfs-3g"):
        pytest.skip("ntfs-3g is not installed")
    image, point = tmp_path / "image", tmp_path / "ntfs"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    point.mkdir()
    subprocess.run(["mkfs.ntfs", "--fast", "--force", "--quiet", image], check=True, capture_output=True)
    if subprocess.run(["ntfs-3g", image, point], check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to mount an image")
    try:
        tested = capabilities.probe(point)
    finally:
        subprocess.run(["umount", point], check=True)
    assert (tested.modes, tested.owners, tested.mtime_ns) == (False, False, 100)


def test_probe_deletes_the_folder_of_a_killed_probe_after_an_hour(tmp_path: Path) -> None:
    old, new = tmp_path / ".firstlight-probe-old", tmp_path / ".firstlight-probe-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "file").touch()
    os.utime(old, (0, 0))
    capabilities.probe(tmp_path)
    assert list(tmp_path.glob(".firstlight-probe-*")) == [new]


def test_times_that_differ_by_less_than_the_unit_of_the_file_system_are_the_same() -> None:
    seconds = KeptMetadata(mtime_ns=10**9)
    assert seconds.is_same_time(5_900_000_000, 5_000_000_000)
    assert not seconds.is_same_time(6_000_000_000, 5_000_000_000)
    assert KeptMetadata().is_same_time(5, 5)
    assert not KeptMetadata().is_same_time(5, 6)
    assert KeptMetadata(mtime_ns=0).is_same_time(5, 10**12)


def test_mount_of_a_folder_is_the_innermost_one_and_the_last_one_at_its_mount_point(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda rw\n"
        f"2 1 0:5 / {tmp_path} rw - tmpfs tmpfs rw,size=1m\n"
        f"3 2 0:6 / {tmp_path} ro,noexec - nfs4 server:/a rw,vers=4.2\n"
        f"4 2 0:7 / {tmp_path}/with\\040space rw - xfs /dev/sdb rw\n"
    )
    (tmp_path / "with space").mkdir()
    mount = mount_of(tmp_path, table)
    assert mount is not None
    assert (mount.file_system, mount.options) == ("nfs4", ("noexec", "ro", "rw", "vers=4.2"))
    other = mount_of(tmp_path / "with space", table)
    assert other is not None
    assert other.point == f"{tmp_path}/with space"
    assert mount_of(tmp_path, tmp_path / "absent") is None


def test_features_of_a_mount_are_probed_once_and_then_read_from_the_record(
    limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = marked_root(limited("no-hardlink"))
    assert volume_capabilities.recorded(root) == volume_capabilities.ensure(root)

    def fail(_: Path) -> Capabilities:
        raise AssertionError

    monkeypatch.setattr(capabilities, "probe", fail)
    assert volume_capabilities.ensure(root).hardlink is False


def test_recorded_features_do_not_apply_on_another_host_or_mount(
    tmp_path: Path, limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = marked_root(limited("no-hardlink"))
    with monkeypatch.context() as patch:
        patch.setattr(platform, "node", lambda: "other-host")
        assert volume_capabilities.recorded(root) is None
        volume_capabilities.ensure(root)
        assert volume_capabilities.recorded(root) is not None
    assert volume_capabilities.recorded(root) is not None  # the other host keeps the entry of this host
    copy = tmp_path / "copy"
    shutil.copytree(root.path, copy)
    assert volume_capabilities.recorded(Root(copy)) is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1, "hosts": []}', '{"schema": 2, "hosts": {}}'])
def test_damaged_record_of_features_is_ignored_and_written_anew(tmp_path: Path, text: str) -> None:
    root = marked_root(tmp_path)
    root.capabilities.write_text(text)
    assert volume_capabilities.recorded(root) is None
    assert volume_capabilities.ensure(root).writable
    assert volume_capabilities.recorded(root) is not None


def test_doctor_names_each_missing_feature_of_a_volume_with_its_consequence(home: Path, limited: Limited) -> None:
    folder = limited("no-hardlink", "no-flock", "no-xattr", "fixed-modes", "owner", "two-seconds", "caseless")
    completed = provision("doctor", "--root", folder)
    lines = completed.stdout.splitlines()
    for name, cost in {
        "hardlink": "an environment takes its space twice",
        "flock": "uv's and conda's caches lie in",
        "modes": "private files may be readable",
        "owners": "the owner that the volume sets",
        "xattr": "lose their extended attributes",
        "case": "names that differ by case only cannot be relocated",
        "mtime": "in units of 2 s",
    }.items():
        assert any(name in line and cost in line for line in lines), (name, completed.stdout)
    assert list(folder.iterdir()) == []


def test_doctor_and_status_write_nothing_on_a_volume_that_is_set_up(home: Path, limited: Limited, envs: Path) -> None:
    root = marked_root(limited())
    (home / "host.toml").write_text("models = []\nrelocate = []\n")
    before = {path: path.stat().st_mtime_ns for path in (root.path, *root.path.rglob("*"))}
    for words in (["doctor"], ["status", "--offline"]):
        completed = provision(*words, "--root", root.path, "--envs", envs, "--host", home / "host.toml")
        assert str(root.path) in completed.stdout, completed.stderr
    assert {path: path.stat().st_mtime_ns for path in (root.path, *root.path.rglob("*"))} == before
