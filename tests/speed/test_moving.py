"""How long a move takes against cp and sha256sum, and how long a repair takes: both sides in one run."""

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
from provision.volume import relink
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
    done = subprocess.run([str(word) for word in argv], capture_output=True, env=env, check=False)
    took = time.perf_counter() - began
    assert done.returncode in accept, done.stdout + done.stderr
    return took


def few(folder: Path) -> None:
    """2 GB in four files."""
    for number in range(4):
        with (folder / f"{number}.safetensors").open("wb") as file:
            for _ in range(512):
                file.write(os.urandom(1 << 20))


def many(folder: Path) -> None:
    """50,000 files of 0.1 to 8 kB."""
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


def moving(source: Path, volume: Path) -> RelocateStep:
    root = Root(volume)
    VolumeStep(root, [], Journal(root.journal)).apply()
    return RelocateStep(
        "work", [RelocatedFolder(source, root.path / "work")], root, source.parent, Journal(root.journal)
    )


@pytest.mark.parametrize("fill", [few, many], ids=["2 GB in 4 files", "50,000 small files"])
def test_a_move_to_another_disk_against_cp_and_sha256sum(
    benchmark: BenchmarkFixture, tmp_path: Path, other_disk: Path, fill: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(fill)
    kept = other_disk / "kept"
    kept.mkdir()
    fill(kept)
    source, volume, copy = other_disk / "home/work", tmp_path / "volume", tmp_path / "copy"
    bare: list[float] = []

    def fresh() -> tuple[tuple[RelocateStep], dict[str, object]]:
        """The other side of the comparison first, then a source to be moved."""
        for folder in (volume, copy, source.parent):
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        both = f"find '{kept}' '{copy}' -type f -print0 | xargs -0 sha256sum >/dev/null"
        # Ours ends with every byte on the disk, so the bare tools have to as well.
        bare.append(seconds(["sh", "-c", f"cp -a '{kept}' '{copy}' && sync -f '{copy}' && {both}"]))
        shutil.rmtree(copy)
        source.parent.mkdir()
        shutil.copytree(kept, source, symlinks=True, copy_function=os.link)
        os.sync()
        return (moving(source, volume),), {}

    benchmark.pedantic(lambda step: step.apply(), setup=fresh, rounds=ROUNDS)
    assert source.is_symlink()
    assert benchmark.stats is not None
    median, other = benchmark.stats.stats.median, sorted(bare)[len(bare) // 2]
    with capsys.disabled():
        print(f"\nmove {median:.2f} s; cp -a, sync, sha256sum of both {other:.2f} s: {median / other:.2f} times")


def test_a_move_on_one_disk(benchmark: BenchmarkFixture, other_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = other_disk / "home/work"
    source.mkdir(parents=True)
    many(source)
    volumes = iter(range(100))
    state = {"at": source}

    def fresh() -> tuple[tuple[RelocateStep], dict[str, object]]:
        if source.is_symlink():
            source.unlink()
            state["at"].rename(source)
        volume = other_disk / f"volume{next(volumes)}"
        state["at"] = volume / "work"
        return (moving(source, volume),), {}

    benchmark.pedantic(lambda step: step.apply(), setup=fresh, rounds=9)
    assert benchmark.stats is not None
    with capsys.disabled():
        print(f"\nmove of 50,000 files on one disk: median {benchmark.stats.stats.median * 1000:.1f} ms")


def test_relink_for_ten_links(
    benchmark: BenchmarkFixture, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Root(tmp_path / "root")
    VolumeStep(root, [], Journal(root.journal)).apply()
    relink.write(root, home, [Link(home / f".cache/{n}", root.cache / f"{n}") for n in range(10)])
    argv: list[object] = ["sh", root.relink, "-q"]
    seconds(argv)

    def wipe() -> tuple[tuple[list[object]], dict[str, object]]:
        shutil.rmtree(home)
        home.mkdir()
        return (argv,), {}

    benchmark.pedantic(seconds, setup=wipe, rounds=21)
    right = sorted(seconds(argv) for _ in range(21))[10]
    empty = sorted(seconds(["sh", "-c", ":"]) for _ in range(21))[10]
    assert benchmark.stats is not None
    made = benchmark.stats.stats.median
    with capsys.disabled():
        print(
            f"\nrelink.sh, 10 links: made {made * 1e3:.1f} ms, right {right * 1e3:.1f} ms, sh itself {empty * 1e3:.1f}"
        )


@pytest.mark.parametrize("broken", [0, 1000])
def test_a_repair(
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
        # The test root's environment on a root of its own, with a thousand links.
        folder.mkdir()
        root = Root(folder)
        VolumeStep(root, [], Journal(root.journal)).apply()
        for number in range(broken):
            (root.cache / f"{number}").mkdir(parents=True)
        relink.write(root, home, [Link(home / f"links/{n}", root.cache / f"{n}") for n in range(broken)])
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
        os.sync()  # or the repair's own sync would pay for the wipe
        return (argv, env), {}

    benchmark.pedantic(seconds, setup=wipe, rounds=9)
    assert len(list((home / "links").glob("*"))) == broken if broken else True
    assert (root.links.read_bytes() if root.links.exists() else None) == before or broken
    assert benchmark.stats is not None
    with capsys.disabled():
        print(f"\nrepair with {broken} links broken: median {benchmark.stats.stats.median:.3f} s")
