"""Tests that a killed build leaves a complete environment or none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from provision.core.step import State
from tests.conftest import CHECKOUT
from tests.provision.environments.conda_steps import env_step

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision import conda_channel

BUILD_PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.provision.environments.conda_steps import env_step
step = env_step(Path(sys.argv[1]), Path(sys.argv[2]))
print("ready", flush=True)
step.apply()
"""


@pytest.mark.parametrize("moment", range(8))
def test_killed_build_leaves_a_complete_environment_or_none(
    tmp_path: Path, conda_envs: Path, conda: conda_channel.FolderServer, greet_wheel: None, moment: int
) -> None:
    """Kill the build and its children after some responses of the channel, or after some hundred written files."""
    root = tmp_path / "root"
    argv = [sys.executable, "-c", BUILD_PROGRAM, str(root), str(conda_envs), str(CHECKOUT)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    build = psutil.Process(process.pid)

    def is_reached() -> bool:
        if moment < 4:
            return len(conda.seen) > moment
        folders = (root / "envs").glob(".*.building-*")
        file_count = sum(len(files) for folder in folders for _, _, files in os.walk(folder))
        return file_count > (moment - 3) * 300 or (root / "envs/diffusers").exists()

    while process.poll() is None and not is_reached():
        os.sched_yield()
    with contextlib.suppress(psutil.NoSuchProcess):
        for running in [*build.children(recursive=True), build]:
            with contextlib.suppress(psutil.NoSuchProcess):
                running.kill()
    process.wait()
    process.stdout.close()
    step = env_step(root, conda_envs)
    check = step.check(deep=True)
    assert check.state is State.OK or not step.prefix.exists(), check.detail
    if check.state is not State.OK:
        step.apply()
    assert step.check(deep=True).state is State.OK
    assert not list(step.prefix.parent.glob(".*"))
