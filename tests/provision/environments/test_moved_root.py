"""Tests environments of a moved root, of a long path, and with a package cache on another file system."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from provision.core.step import State
from provision.volume.environment_marker import read_owner
from tests.provision.conftest import lock_text, write_wheel
from tests.provision.environments.conda_steps import env_step, output_of

if TYPE_CHECKING:
    from pathlib import Path

    from provision.environments.step import EnvStep
    from tests.provision import conda_channel


def test_conda_environment_of_a_moved_root_gets_its_paths_rewritten(
    step: EnvStep, tmp_path: Path, conda_envs: Path, greet_wheel: None, other_disk: Path
) -> None:
    step.apply()
    moved = other_disk / "moved"
    shutil.copytree(tmp_path / "root", moved, symlinks=True)
    shutil.rmtree(tmp_path / "root")
    moved_step = env_step(moved, conda_envs, offline=True)
    assert "its files must be rewritten for" in moved_step.check().detail
    moved_step.apply()
    check = moved_step.check(deep=True)
    assert check.state is State.OK, check.detail
    assert output_of(moved_step.prefix / "bin/hello") == "hello from conda"
    assert output_of(moved_step.prefix / "bin/greet") == "hello from pip"
    for script in (moved_step.prefix / "bin").iterdir():
        assert str(tmp_path / "root").encode() not in script.read_bytes()[:500]
    assert (read_owner(moved_step.prefix) or {})["prefix"] == str(moved_step.prefix)


def test_venv_works_after_its_root_was_moved_without_a_repair(tmp_path: Path, envs: Path, wheels: Path) -> None:
    points = "[console_scripts]\ngreet = greet:main\n"
    files = {"greet.py": "def main():\n    print('hi')\n", "greet-1.0.dist-info/entry_points.txt": points}
    write_wheel(wheels, "greet", "1.0", files)
    (envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    env_step(tmp_path / "root", envs).apply()
    (tmp_path / "root").rename(tmp_path / "moved")
    moved_step = env_step(tmp_path / "moved", envs)
    assert moved_step.check(deep=True).state is State.OK
    assert output_of(moved_step.prefix / "bin/greet") == "hi"


def test_root_with_a_path_too_long_for_the_first_line_of_a_script_causes_a_warning(
    tmp_path: Path, conda_envs: Path, conda: conda_channel.FolderServer
) -> None:
    long_path = tmp_path / ("x" * 60) / ("y" * 60)
    step = env_step(long_path, conda_envs)
    step.apply()
    assert "has more than 127 characters" in (step.check().fallback or "")


def test_package_cache_on_another_file_system_causes_a_warning(step: EnvStep, other_disk: Path) -> None:
    step.root.path.mkdir()
    step.root.pkgs.symlink_to(other_disk)
    step.apply()
    assert "another file system" in (step.check().fallback or "")
