"""Measures the time of commands as a multiple of an empty interpreter's, and of setup as a multiple of plain uv's."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from provision.installers import pip_settings
from provision.installers import uv as uv_installer
from tests.conftest import CHECKOUT, MACHINE, TEST_ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture


def seconds(argv: list[object], env: dict[str, str], accept: tuple[int, ...] = (0,)) -> float:
    began = time.perf_counter()
    process = subprocess.run([str(word) for word in argv], capture_output=True, text=True, env=env, check=False)
    elapsed = time.perf_counter() - began
    assert process.returncode in accept, process.stdout + process.stderr
    return elapsed


@pytest.mark.parametrize("words", [["--help"], ["status"]], ids=["provision --help", "provision status"])
def test_time_of_a_command_against_an_empty_interpreter(
    benchmark: BenchmarkFixture, words: list[str], home: Path, measured_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    flags = ["--root", TEST_ROOT, "--host", CHECKOUT / "tests/data/host.toml"] if words == ["status"] else []
    argv: list[object] = [sys.executable, "-m", "provision", *words, *flags]
    benchmark.pedantic(seconds, args=(argv, env), rounds=9, iterations=1, warmup_rounds=1)
    empty = statistics.median(seconds([sys.executable, "-c", ""], env) for _ in range(9))
    assert benchmark.stats is not None
    median = benchmark.stats.stats.median
    with capsys.disabled():
        print(f"\nprovision {words[0]}: median {median:.3f} s, {median / empty:.1f} times an empty interpreter")


def test_time_of_setup_on_an_empty_root_against_uv_alone(
    benchmark: BenchmarkFixture, tmp_path: Path, home: Path, measured_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Both sides start with empty caches and use the same package index. firstlight's own .venv exists already.
    machine = {key: value for key, value in MACHINE.items() if not key.startswith("HF_")} | {"HOME": str(home)}
    settings = pip_settings.pip_settings(MACHINE)
    names = ("index-url", "extra-index-url", "find-links", "cert")
    machine |= {f"PIP_{name.upper().replace('-', '_')}": " ".join(settings[name]) for name in names if name in settings}
    machine |= {"PYTHONPATH": str(CHECKOUT)}
    machine.pop("PYTHONDONTWRITEBYTECODE", None)
    lock = CHECKOUT / "envs/diffusers/cpu.lock"
    uv = uv_installer.for_uv(machine, tmp_path / "bare-cache", offline=False)
    python = tmp_path / "bare/bin/python"
    prefix = [uv_installer.uv_binary(), "venv", "--quiet", "--python", uv_installer.base_python(), tmp_path / "bare"]
    sync = [uv_installer.uv_binary(), "pip", "sync", "--quiet", "--require-hashes", *uv.flags, "--python", python, lock]
    bare = seconds(prefix, uv.environment) + seconds(sync, uv.environment)
    first_import = seconds([python, "-c", "import torch; from diffusers import UNet2DModel"], uv.environment)
    shutil.rmtree(tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare-cache")
    (tmp_path / "host.toml").write_text("models = []\nmirror = 'keep'\n")
    setup = [sys.executable, "-m", "provision", "setup", "--root", tmp_path / "root", "--host", tmp_path / "host.toml"]
    whole = benchmark.pedantic(seconds, args=(setup, machine), rounds=1, iterations=1)
    with capsys.disabled():
        print(
            f"\nsetup {whole:.1f} s; bare uv {bare:.1f} s: {whole / bare:.2f} times; "
            f"bare uv and the first import {bare + first_import:.1f} s: {whole / (bare + first_import):.2f} times"
        )
