"""Choosing among mirrors against asking one after another; an install whose mirror dies against one whose does not."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
import requests

from provision.installers import uv as uv_installer
from provision.lockfiles import requirements
from provision.mirrors import failover_proxy, probe
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.probe_mirror import ProbeTarget
from provision.mirrors.record import MirrorSource
from provision.net.source_health import SourceHealth
from tests.provision.conftest import lock_text, write_wheel
from tests.provision.http_server import Fault, Played, index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

COUNT, SIZE = 20, 2_000_000


@pytest.fixture
def play() -> Iterator[Any]:
    started: list[Played] = []

    def start(content: dict[str, bytes], *faults: Fault) -> Played:
        started.append(Played(content, *faults))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Twenty wheels of 2 MB that do not compress away."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    return [
        write_wheel(folder, f"part{number}", "1.0", {f"part{number}.txt": os.urandom(SIZE // 2).hex()})
        for number in range(COUNT)
    ]


def session() -> requests.Session:
    return requests.Session()


def test_choosing_among_37_mirrors_half_of_them_stalling(
    benchmark: BenchmarkFixture, play: Any, files: list[Path]
) -> None:
    """All at once against one after another, both by the same look."""
    content = index(files[:3])
    every = [
        ProbeTarget("pip", f"m{number}", f"{play(content, *([Fault(stall=True)] if number % 2 else [])).url}/simple")
        for number in range(37)
    ]
    known = {
        "pip": [
            ProbeFile(f"part{n}", "1.0", "", frozenset({_digest(files[n])}), files[n].stat().st_size) for n in range(3)
        ]
    }
    began = time.perf_counter()
    for each in every:
        probe.probe([each], known, session)
    in_turn = time.perf_counter() - began
    benchmark.pedantic(lambda: probe.probe(every, known, session), rounds=3)
    stats = benchmark.stats
    assert stats is not None
    benchmark.extra_info |= {"in_turn_s": in_turn, "ratio": stats.stats.median / in_turn}


def test_an_install_through_the_relay_and_one_whose_mirror_dies(
    benchmark: BenchmarkFixture, play: Any, tmp_path: Path, files: list[Path]
) -> None:
    """Against bare uv with the same mirror; and when that dies, or falls silent, at half of the files."""
    content, lock = index(files), lock_text(*files)
    took: dict[str, list[float]] = {"bare": [], "relay": [], "dies": [], "falls silent": []}

    def once(kind: str) -> float:
        faults = {"dies": [Fault("/files/", cut=SIZE // 4, after=COUNT // 2)]}
        faults["falls silent"] = [Fault("/files/", stall_at=SIZE // 4, after=COUNT // 2)]
        first, second = play(content, *faults.get(kind, [])), play(content)
        prefix, cache = tmp_path / "env", tmp_path / "cache"
        for folder in (prefix, cache):
            shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([uv_installer.uv_binary(), "venv", "-q", prefix], check=True)
        uv = uv_installer.for_uv(os.environ, cache, offline=False).environment
        argv = [str(uv_installer.uv_binary()), "pip", "install", "-q", "--no-deps", "--require-hashes", "-r", "-"]
        argv += ["--python", str(prefix)]
        began = time.perf_counter()
        if kind == "bare":
            env = uv | {"UV_DEFAULT_INDEX": f"{first.url}/simple"}
            subprocess.run(argv, env=env, input=lock, text=True, check=True)
        else:
            both = [MirrorSource("first", f"{first.url}/simple"), MirrorSource("second", f"{second.url}/simple")]
            with failover_proxy.FailoverProxy(
                requests.Session(), tmp_path / "arriving", SourceHealth(), lambda _, __: None
            ) as running:
                running.wheels(requirements.hashes(lock), both)
                subprocess.run(argv, env=running.environment(uv), input=lock, text=True, check=True)
                running.finish()
        seconds = time.perf_counter() - began
        first.close()
        second.close()
        return seconds

    for _ in range(3):
        for kind, seen in took.items():
            seen.append(once(kind))
    benchmark.pedantic(lambda: once("dies"), rounds=1)
    medians = {kind: statistics.median(seen) for kind, seen in took.items()}
    benchmark.extra_info |= {f"{kind}_s": median for kind, median in medians.items()}
    benchmark.extra_info |= {"ratio": medians["relay"] / medians["bare"]}
    benchmark.extra_info |= {
        f"{kind}, more seconds": medians[kind] - medians["relay"] for kind in ("dies", "falls silent")
    }


def _digest(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()
