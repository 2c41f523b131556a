"""Sets up a host with the real packages, offline, from the uv cache of the environment that `make test` has built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from provision.installers import pip_settings
from tests.conftest import CHECKOUT, MACHINE, TEST_ROOT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.worker
def test_setup_builds_the_real_environment_and_runs_a_real_denoising_step(
    tmp_path: Path, home: Path, measured_python: Path
) -> None:
    (tmp_path / "host.toml").write_text("models = []\n")
    cache = {"UV_CACHE_DIR": str(TEST_ROOT / "cache/uv"), "PYTHONPATH": str(CHECKOUT)}
    # uv finds a cached wheel by the index or folder of its download, so this machine's pip settings apply.
    settings = pip_settings.pip_settings(MACHINE)
    names = ("index-url", "extra-index-url", "find-links")
    links = {f"PIP_{name.upper().replace('-', '_')}": " ".join(settings[name]) for name in names if name in settings}
    argv = [sys.executable, "-m", "provision", "setup", "--offline", "--json"]
    argv += ["--root", str(tmp_path / "root"), "--host", str(tmp_path / "host.toml")]
    completed = subprocess.run(
        argv, capture_output=True, text=True, env=dict(os.environ) | cache | links, check=False, timeout=1200
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    outcomes = {row["step"]: row for row in json.loads(completed.stdout)["outcomes"]}
    assert "diffusers 0.42.1: one denoising step on cpu" in outcomes["smoke"]["detail"]
    entries = sorted(str(path.relative_to(home)) for path in home.rglob("*"))
    caches = [".cache", ".cache/huggingface", ".cache/huggingface/hub", ".cache/huggingface/xet"]
    state = ".local/state/firstlight"
    expected = [*caches, ".local", ".local/state", state, f"{state}/roots.json"]
    assert entries == expected, "setup makes nothing else in the home"
