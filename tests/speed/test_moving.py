"""Compares a folder move with cp and sha256sum, and measures the time of relink.sh and of `provision repair`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from provision.core.layout import Root
from provision.host.tool_caches import RelocatedFolder
from provision.relocation.step import RelocateStep
from provision.volume import link_files
from provision.volume.journal import Journal
from provision.volume.links import Link
from provision.volume.marker import VolumeStep
from tests.conftest import CHECKOUT, TEST_ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 3


def seconds(argv: list[object], env: dict[str, str] | None = None, accept: tuple[int, ...] = (0,)) -> float:
    began = time.perf_counter()
    process = subprocess.run([str(word) for word in argv], capture_output=True, env=env, check=False)
    elapsed = time.perf_counter() - began
    assert process.returncode in accept, process.stdout + process.stderr
    return elapsed


def write_large_files(folder: Path) -> None:
    """Write 2 GB in four files."""
    for number in range(4):
        with (folder / f"{number}.safetensors").open("wb") as file:
            for _ in range(512):
                file.write(os.urandom(1 << 20))


def write_small_files(folder: Path) -> None:
    """Write 50,000 files of 0.1 to 8 kB."""
    noise = os.urandom(16_000)
    for number in range(50_000):
        if number % 100 == 0:
            below = folder / f"{number // 100}"
            below.mkdir()
        (below / f"{number}").write_bytes(noise[number % 7919 : number % 7919 + 100 + number % 7900])


@pytest.fixture
def other_disk() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def move_step(source: Path, volume: Path) -> RelocateStep:
    root = Root(volume)
    VolumeStep(root, [], Journal(root.journal)).apply()
    return RelocateStep(
        "work", [RelocatedFolder(source, root.path / "work")], root, source.parent, Journal(root.journal)
    )


@pytest.mark.parametrize("fill", [write_large_files, write_small_files], ids=["2 GB in 4 files", "50,000 small files"])
def test_time_of_a_move_to_another_disk_against_cp_and_sha256sum(
    benchmark: BenchmarkFixture, tmp_path: Path, other_disk: Path, fill: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(fill)
    kept = other_disk / "kept"
    kept.mkdir()
    fill(kept)
    source, volume, copy = other_disk / "home/work", tmp_path / "volume", tmp_path / "copy"
    bare: list[float] = []

    def fresh() -> tuple[tuple[RelocateStep], dict[str, object]]:
        """Time cp and sha256sum, and then make a new source folder for the move."""
        for folder in (volume, copy, source.parent):
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        both = f"find '{kept}' '{copy}' -type f -print0 | xargs -0 sha256sum >/dev/null"
        # A move ends after a sync, so the commands on the other side sync too.
        bare.append(seconds(["sh", "-c", f"cp -a '{kept}' '{copy}' && sync -f '{copy}' && {both}"]))
        shutil.rmtree(copy)
        source.parent.mkdir()
        shutil.copytree(kept, source, symlinks=True, copy_function=os.link)
        os.sync()
        return (move_step(source, volume),), {}

    benchmark.pedantic(lambda step: step.apply(), setup=fresh, rounds=ROUNDS)
    assert source.is_symlink()
    assert benchmark.stats is not None
    median, other = benchmark.stats.stats.median, sorted(bare)[len(bare) // 2]
    with capsys.disabled():
        print(f"\nmove {median:.2f} s; cp -a, sync, sha256sum of both {other:.2f} s: {median / other:.2f} times")


def test_time_of_a_move_of_50000_files_on_one_disk(
    benchmark: BenchmarkFixture, other_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = other_disk / "home/work"
    source.mkdir(parents=True)
    write_small_files(source)
    volumes = iter(range(100))
    state = {"at": source}

    def fresh() -> tuple[tuple[RelocateStep], dict[str, object]]:
        if source.is_symlink():
            source.unlink()
            state["at"].rename(source)
        volume = other_disk / f"volume{next(volumes)}"
        state["at"] = volume / "work"
        return (move_step(source, volume),), {}

    benchmark.pedantic(lambda step: step.apply(), setup=fresh, rounds=9)
    assert benchmark.stats is not None
    with capsys.disabled():
        print(f"\nmove of 50,000 files on one disk: median {benchmark.stats.stats.median * 1000:.1f} ms")


def test_time_of_relink_sh_for_ten_links_after_a_wipe_and_unchanged(
    benchmark: BenchmarkFixture, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Root(tmp_path / "root")
    VolumeStep(root, [], Journal(root.journal)).apply()
    link_files.write(root, home, [Link(home / f".cache/{n}", root.cache / f"{n}") for n in range(10)])
    argv: list[object] = ["sh", root.relink, "-q"]
    seconds(argv)

    def wipe() -> tuple[tuple[list[object]], dict[str, object]]:
        shutil.rmtree(home)
        home.mkdir()
        return (argv,), {}

    benchmark.pedantic(seconds, setup=wipe, rounds=21)
    unchanged = sorted(seconds(argv) for _ in range(21))[10]
    empty = sorted(seconds(["sh", "-c", ":"]) for _ in range(21))[10]
    assert benchmark.stats is not None
    created = benchmark.stats.stats.median
    with capsys.disabled():
        print(
            f"\nrelink.sh, 10 links: created {created * 1e3:.1f} ms, unchanged {unchanged * 1e3:.1f} ms, "
            f"sh itself {empty * 1e3:.1f} ms"
        )


@pytest.mark.parametrize("broken", [0, 1000], ids=["real root, no link", "1000 links"])
def test_time_of_provision_repair_after_a_wipe(
    benchmark: BenchmarkFixture,
    home: Path,
    tmp_path: Path,
    measured_python: Path,
    broken: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = Root(TEST_ROOT)
    before = root.links.read_bytes() if root.links.exists() else None
    folder = tmp_path / "root"
    if broken:
        # A new root with an environment without packages, and 1000 recorded links.
        folder.mkdir()
        root = Root(folder)
        VolumeStep(root, [], Journal(root.journal)).apply()
        for number in range(broken):
            (root.cache / f"{number}").mkdir(parents=True)
        link_files.write(root, home, [Link(home / f"links/{n}", root.cache / f"{n}") for n in range(broken)])
        (tmp_path / "envs/plain").mkdir(parents=True)
        (tmp_path / "envs/plain/requirements.in").write_text("")
        (tmp_path / "envs/plain/requirements.lock").write_text("")
        for name in ("torch.toml", "models.toml"):
            shutil.copy2(CHECKOUT / "envs" / name, tmp_path / "envs" / name)
        (tmp_path / "host.toml").write_text('env = "plain"\nmodels = []\nrelocate = []\n')
        flags: list[object] = ["--root", folder, "--host", tmp_path / "host.toml", "--envs", tmp_path / "envs"]
    else:
        flags = ["--root", TEST_ROOT, "--host", CHECKOUT / "tests/data/host.toml"]
    env = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)}
    argv: list[object] = [sys.executable, "-m", "provision", "repair", *flags]
    seconds(argv, env)

    def wipe() -> tuple[tuple[list[object], dict[str, str]], dict[str, object]]:
        shutil.rmtree(home)
        home.mkdir()
        os.sync()  # otherwise the sync of the repair would also write the changes of the wipe
        return (argv, env), {}

    benchmark.pedantic(seconds, setup=wipe, rounds=9)
    assert len(list((home / "links").glob("*"))) == broken if broken else True
    assert (root.links.read_bytes() if root.links.exists() else None) == before or broken
    assert benchmark.stats is not None
    with capsys.disabled():
        print(f"\nrepair with {broken} links broken: median {benchmark.stats.stats.median:.3f} s")
