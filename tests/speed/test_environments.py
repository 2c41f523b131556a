"""Compares the creation of environments with plain rattler, uv and pip, and their verification with sha256sum."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from provision.environments import installed_wheels, prefix
from provision.installers import pip_settings
from provision.installers import uv as uv_installer
from provision.lockfiles import conda_lock
from provision.lockfiles.folder import LockFolder
from provision.volume import environment_marker
from tests.conftest import CHECKOUT, MACHINE, TEST_ROOT
from tests.provision import conda_channel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

LOCK = CHECKOUT / "envs/diffusers/cpu.lock"
# Installs a conda lock file as py-rattler's documentation shows. It ends by os._exit, as firstlight's worker does.
BARE = """
import asyncio, os, sys, rattler
from rattler.networking.middleware import MirrorMiddleware
lock, prefix, pkgs, mirror = sys.argv[1:]
environment = rattler.LockFile.from_path(lock).default_environment()
records = environment.conda_repodata_records_for_platform(environment.platforms()[0])
client = rattler.Client([MirrorMiddleware({"https://conda.anaconda.org/": [mirror + "/"]})])
asyncio.run(rattler.install(records, target_prefix=prefix, cache_dir=pkgs, client=client, show_progress=False))
os._exit(0)
"""


def seconds(argv: list[object], env: dict[str, str], stdin: str | None = None) -> float:
    began = time.perf_counter()
    words = [str(word) for word in argv]
    process = subprocess.run(words, capture_output=True, text=True, env=env, check=False, input=stdin)
    elapsed = time.perf_counter() - began
    assert process.returncode == 0, process.stdout + process.stderr
    return elapsed


@pytest.fixture
def served(tmp_path: Path) -> Iterator[conda_channel.FolderServer]:
    conda_channel.build(tmp_path / "channel/conda-forge")
    yield from conda_channel.serving(tmp_path / "channel")


@pytest.fixture
def envs(tmp_path: Path, served: conda_channel.FolderServer) -> Path:
    """Return a copy of the shipped envs/ whose conda packages come from the channel on loopback."""
    folder = tmp_path / "envs"
    shutil.copytree(CHECKOUT / "envs", folder)
    packages = conda_channel.locked(served.folder / "conda-forge", "python", "pip")
    text = conda_lock.lock_text(packages, ["conda-forge"], ["environment.yml"])
    (folder / "diffusers/conda-lock.yml").write_text(text)
    return folder


@pytest.fixture
def machine(home: Path, served: conda_channel.FolderServer) -> dict[str, str]:
    """Return the environment variables: the machine's package sources, an empty home, and the channel as mirror."""
    env = {key: value for key, value in MACHINE.items() if not key.startswith("HF_")} | {"HOME": str(home)}
    settings = pip_settings.pip_settings(MACHINE)
    names = ("index-url", "extra-index-url", "find-links", "cert")
    env |= {f"PIP_{name.upper().replace('-', '_')}": " ".join(settings[name]) for name in names if name in settings}
    env |= {"PYTHONPATH": str(CHECKOUT), "CONDA_CHANNEL_ALIAS": served.url, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return env


@pytest.mark.parametrize("caches", ["cold", "warm"], ids=["empty caches", "filled caches"])
def test_time_of_env_create_against_rattler_and_uv_alone(
    benchmark: BenchmarkFixture,
    tmp_path: Path,
    envs: Path,
    served: conda_channel.FolderServer,
    machine: dict[str, str],
    caches: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Both sides are whole commands, which alternate, and compile no bytecode. Only firstlight detects the machine and
    # verifies the installed files.
    (tmp_path / "host.toml").write_text("relocate = []\nmodels = []\n")
    root, bare = tmp_path / "root", tmp_path / "bare"
    uv = uv_installer.for_uv(machine, bare / "uv", offline=False)
    rattler = [sys.executable, "-c", BARE, envs / "diffusers/conda-lock.yml", bare / "env", bare / "pkgs", served.url]
    python = bare / "env/bin/python"
    sync = [uv_installer.uv_binary(), "pip", "sync", "--quiet", "--require-hashes", *uv.flags, "--python", python, LOCK]
    ours = [sys.executable, "-m", "provision", "env", "create", "--interpreter", "conda", "--root", root]
    ours += ["--host", tmp_path / "host.toml", "--envs", envs]

    def rattler_and_uv_seconds() -> float:
        shutil.rmtree(bare if caches == "cold" else bare / "env", ignore_errors=True)
        return seconds(rattler, machine) + seconds(sync, uv.environment)

    def clear() -> None:
        shutil.rmtree(root if caches == "cold" else root / "envs", ignore_errors=True)

    if caches == "warm":
        rattler_and_uv_seconds()
        seconds(ours, machine)
    rounds = 3
    bare_seconds = []

    def alternate() -> None:
        bare_seconds.append(rattler_and_uv_seconds())
        clear()

    benchmark.pedantic(lambda: seconds(ours, machine), setup=alternate, rounds=rounds, iterations=1)
    assert benchmark.stats is not None
    median, other = benchmark.stats.stats.median, statistics.median(bare_seconds)
    with capsys.disabled():
        print(f"\nenv create, {caches}: {median:.2f} s; bare {other:.2f} s: {median / other:.2f} times")


def test_time_of_env_create_against_pip(
    benchmark: BenchmarkFixture,
    tmp_path: Path,
    envs: Path,
    machine: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Both sides have filled caches, start without an environment, and compile no bytecode.
    (tmp_path / "host.toml").write_text("relocate = []\nmodels = []\n")
    root = tmp_path / "root"
    ours = [sys.executable, "-m", "provision", "env", "create", "--interpreter", "conda", "--root", root]
    ours += ["--host", tmp_path / "host.toml", "--envs", envs]

    def pip() -> float:
        shutil.rmtree(tmp_path / "pip", ignore_errors=True)
        elapsed = seconds([sys.executable, "-m", "venv", tmp_path / "pip"], machine)
        install = [tmp_path / "pip/bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        return elapsed + seconds([*install, "--no-compile", "-r", LOCK], machine)

    pip()
    seconds(ours, machine)
    benchmark.pedantic(
        lambda: seconds(ours, machine), setup=lambda: shutil.rmtree(root / "envs"), rounds=3, iterations=1
    )
    slow = pip()
    assert benchmark.stats is not None
    median = benchmark.stats.stats.median
    with capsys.disabled():
        print(f"\nenv create, warm: {median:.2f} s; pip, warm: {slow:.2f} s: {slow / median:.1f} times faster")


def test_time_of_verifying_an_environment_against_sha256sum(
    benchmark: BenchmarkFixture, measured_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Both sides read the same files of the real environment from the page cache, and use all cores.
    env = TEST_ROOT / "envs/diffusers"
    version = prefix.python_version(measured_python)
    assert version is not None
    site = environment_marker.site_packages(env, version)
    locked = LockFolder(LOCK.parent).packages(LOCK.stem, version)
    files = [file for file in site.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    listing = "\0".join(map(str, files))
    tool: list[object] = ["xargs", "-0", "-P", os.cpu_count(), "-n", 400, "sha256sum"]

    def verify() -> None:
        assert installed_wheels.damaged_packages(site, locked, deep=True) == {}

    tool_seconds = []
    benchmark.pedantic(
        verify, setup=lambda: tool_seconds.append(seconds(tool, dict(os.environ), listing)), rounds=5, iterations=1
    )
    assert benchmark.stats is not None
    size = sum(file.stat().st_size for file in files)
    median, other = benchmark.stats.stats.median, statistics.median(tool_seconds)
    with capsys.disabled():
        print(
            f"\nverify {size / 1e9:.2f} GB in {len(files)} files: {median:.2f} s, {size / median / 1e6:.0f} MB/s; "
            f"sha256sum on {os.cpu_count()} cores {other:.2f} s: {other / median:.2f} times its rate"
        )


def test_time_of_a_quick_check_of_an_environment_against_a_walk_over_its_files(
    benchmark: BenchmarkFixture, measured_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The reference visits every file of the same environment and reads its size.
    env = TEST_ROOT / "envs/diffusers"
    version = prefix.python_version(measured_python)
    assert version is not None
    site = environment_marker.site_packages(env, version)
    locked = LockFolder(LOCK.parent).packages(LOCK.stem, version)
    walk_seconds: list[float] = []

    def walk() -> None:
        began = time.perf_counter()
        prefix.size_bytes(env)
        walk_seconds.append(time.perf_counter() - began)

    benchmark.pedantic(
        lambda: installed_wheels.damaged_packages(site, locked, deep=False), setup=walk, rounds=5, iterations=1
    )
    assert benchmark.stats is not None
    median = benchmark.stats.stats.median
    with capsys.disabled():
        print(
            f"\nquick check: {median:.3f} s, {median / statistics.median(walk_seconds):.2f} times a walk over the files"
        )
