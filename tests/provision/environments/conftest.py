"""Provides steps of environments on the conda channel of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.provision.conftest import lock_text, write_wheel
from tests.provision.environments.conda_steps import env_step

if TYPE_CHECKING:
    from pathlib import Path

    from provision.environments.step import EnvStep
    from tests.provision import conda_channel


@pytest.fixture
def step(tmp_path: Path, conda_envs: Path, conda: conda_channel.FolderServer) -> EnvStep:
    """Return the setup step of an environment whose Python comes from the conda channel on loopback."""
    return env_step(tmp_path / "root", conda_envs)


@pytest.fixture
def greet_wheel(conda_envs: Path, wheels: Path) -> None:
    """Make a wheel with the console script `greet`, and add it to the pip lock."""
    points = "[console_scripts]\ngreet = greet:main\n"
    files = {"greet.py": "def main():\n    print('hello from pip')\n", "greet-1.0.dist-info/entry_points.txt": points}
    write_wheel(wheels, "greet", "1.0", files)
    (conda_envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
