"""Tests environments on volumes with limits: what works, where the caches are, and what is refused before a write."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from provision.core import layout
from provision.core.errors import BlockedError
from provision.core.layout import Root
from provision.core.step import State
from provision.volume import volume_capabilities
from provision.volume.journal import Journal
from provision.volume.marker import VolumeStep
from tests.provision.environments.conda_steps import env_step
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from tests.provision import conda_channel

Limited = Callable[..., Path]

# The library filelock warns when it falls back to another kind of lock.
pytestmark = pytest.mark.filterwarnings("ignore:flock not supported:UserWarning")
REFUSALS = [
    ("no-exec", "no program on {root} can be started"),
    ("no-symlink", "{root} cannot store symbolic links"),
    ("no-chmod", "chmod fails on {root}"),
]


def host_flags(home: Path, volume: Path, envs: Path) -> list[object]:
    """Write a host.toml that relocates the hub cache and has no models; return the flags --root, --envs and --host."""
    (home / "host.toml").write_text('models = []\nrelocate = ["huggingface"]\n')
    return ["--root", volume, "--envs", envs, "--host", home / "host.toml"]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("interpreter", ["system", "conda"])
@pytest.mark.parametrize(
    "limit", ["no-flock", "no-hardlink", "no-hardlink no-exchange", "fixed-modes", "owner", "seconds", "no-xattr"]
)
def test_environment_is_built_on_a_volume_that_lacks_a_feature_and_its_caches_are_local_without_flock_or_links(
    home: Path,
    limited: Limited,
    conda: conda_channel.FolderServer,
    conda_envs: Path,
    limit: str,
    interpreter: str,
) -> None:
    volume = limited(*limit.split())
    VolumeStep(Root(volume), [], Journal(Root(volume).journal)).apply()
    step = env_step(volume, conda_envs, interpreter=interpreter)
    step.apply()
    check = step.check(deep=True)
    assert check.state is State.OK, check.detail
    caches = layout.tool_folder("packages")
    missing_features = {"no-flock": "no flock", "no-hardlink no-exchange": "neither hard links nor renameat2"}.get(
        limit
    )
    assert caches.exists() == (missing_features is not None)
    if missing_features is not None:
        assert check.fallback is not None
        assert f"{volume} has {missing_features}" in check.fallback
        assert not (volume / "pkgs").exists()
        assert not (volume / "cache/uv").exists()


@pytest.mark.parametrize(("limit", "text"), REFUSALS)
def test_setup_on_a_volume_where_no_environment_works_is_blocked_before_the_first_write(
    home: Path, limited: Limited, envs: Path, limit: str, text: str
) -> None:
    volume = limited(limit)
    (home / ".cache/huggingface/hub").mkdir(parents=True)
    completed = provision("setup", *host_flags(home, volume, envs), "--offline")
    assert completed.returncode == 4
    line = next(line for line in completed.stdout.splitlines() if text.format(root=volume) in line)
    assert "so no environment works there" in line
    assert "--root DIR" in line
    assert {path.name for path in files(volume)} <= {"lock"}  # the empty file of the run lock
    assert not (home / ".cache/huggingface/hub").is_symlink()


@pytest.mark.parametrize(("limit", "text"), REFUSALS)
def test_environment_on_a_root_where_none_works_is_blocked_before_the_first_write(
    home: Path, limited: Limited, envs: Path, limit: str, text: str
) -> None:
    volume = limited(limit)
    root = Root(volume)
    VolumeStep(root, [], Journal(root.journal)).apply()
    step = env_step(volume, envs, interpreter="system")
    before = files(volume)
    assert step.check().state is State.BLOCKED
    with pytest.raises(BlockedError, match="so no environment works there"):
        step.apply()
    assert text.format(root=volume) in step.check().detail
    assert files(volume) == before


def test_plan_on_a_noexec_mount_is_blocked_and_writes_nothing(home: Path, tmp_path: Path, envs: Path) -> None:
    volume = tmp_path / "noexec"
    volume.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "noexec,size=8m", "tmpfs", str(volume)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        completed = provision("plan", *host_flags(home, volume, envs))
        assert completed.returncode == 4
        assert f"(tmpfs at {volume}, mounted with noexec)" in completed.stdout
        assert f"mount -o remount,exec {volume}" in completed.stdout
        assert list(volume.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,exec", volume], check=True)
        assert volume_capabilities.environment_obstacle(Root(volume)) is None
    finally:
        subprocess.run(["umount", volume], check=True)


def test_folder_is_relocated_to_a_noexec_volume(home: Path, limited: Limited, envs: Path) -> None:
    volume = limited("no-exec")
    (home / "data").mkdir()
    (home / "data/file").write_text("mine")
    assert provision("relocate", home / "data", *host_flags(home, volume, envs)).returncode == 0
    assert (home / "data/file").read_text() == "mine"
    assert (home / "data").is_symlink()


def test_limit_that_was_recorded_for_another_mount_does_not_block_an_environment(
    home: Path, limited: Limited, envs: Path
) -> None:
    volume = limited()
    root = Root(volume)
    VolumeStep(root, [], Journal(root.journal)).apply()
    text = root.capabilities.read_text().replace('"execute": true', '"execute": false')
    root.capabilities.write_text(text)
    assert volume_capabilities.environment_obstacle(root) is not None
    root.capabilities.write_text(text.replace('"file_system": "fuse"', '"file_system": "fuse.other"'))
    assert volume_capabilities.environment_obstacle(root) is None
