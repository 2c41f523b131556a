"""Compares the probe of mirrors with a sequential one, and an install whose mirror fails with an undisturbed one."""

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
from provision.mirrors import failover_proxy, probe_all
from provision.mirrors.chosen_mirrors import MirrorSource
from provision.mirrors.probe_files import ProbeFile
from provision.mirrors.probe_mirror import ProbeTarget
from provision.net.source_health import SourceHealth
from tests.provision.conftest import lock_text, write_wheel
from tests.provision.http_server import Fault, Server, index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

COUNT, SIZE = 20, 2_000_000


@pytest.fixture
def serve() -> Iterator[Any]:
    started: list[Server] = []

    def start(content: dict[str, bytes], *faults: Fault) -> Server:
        started.append(Server(content, *faults))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Return twenty wheels of 2 MB that cannot be compressed."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    return [
        write_wheel(folder, f"part{number}", "1.0", {f"part{number}.txt": os.urandom(SIZE // 2).hex()})
        for number in range(COUNT)
    ]


def session() -> requests.Session:
    return requests.Session()


def test_time_of_probing_37_mirrors_of_which_half_stall_against_one_after_another(
    benchmark: BenchmarkFixture, serve: Any, files: list[Path]
) -> None:
    # The same code probes all mirrors at once, and then one mirror after another.
    content = index(files[:3])
    targets = [
        ProbeTarget("pip", f"m{number}", f"{serve(content, *([Fault(stall=True)] if number % 2 else [])).url}/simple")
        for number in range(37)
    ]
    probe_files = {
        "pip": [
            ProbeFile(f"part{n}", "1.0", "", frozenset({_digest(files[n])}), files[n].stat().st_size) for n in range(3)
        ]
    }
    began = time.perf_counter()
    for target in targets:
        probe_all.probe([target], probe_files, session)
    one_after_another = time.perf_counter() - began
    benchmark.pedantic(lambda: probe_all.probe(targets, probe_files, session), rounds=3)
    stats = benchmark.stats
    assert stats is not None
    benchmark.extra_info |= {"in_turn_s": one_after_another, "ratio": stats.stats.median / one_after_another}


def test_time_of_an_install_through_the_failover_proxy_with_and_without_a_failing_mirror(
    benchmark: BenchmarkFixture, serve: Any, tmp_path: Path, files: list[Path]
) -> None:
    # The reference is uv without the proxy, with the same mirror. In the kinds "dies" and "falls silent", the first
    # mirror disconnects or stalls after half of the files.
    content, lock = index(files), lock_text(*files)
    times: dict[str, list[float]] = {"bare": [], "relay": [], "dies": [], "falls silent": []}

    def once(kind: str) -> float:
        faults = {"dies": [Fault("/files/", cut=SIZE // 4, after=COUNT // 2)]}
        faults["falls silent"] = [Fault("/files/", stall_at=SIZE // 4, after=COUNT // 2)]
        first, second = serve(content, *faults.get(kind, [])), serve(content)
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
            ) as proxy:
                proxy.wheels(requirements.hashes(lock), both)
                subprocess.run(argv, env=proxy.environment(uv), input=lock, text=True, check=True)
                proxy.finish()
        seconds = time.perf_counter() - began
        first.close()
        second.close()
        return seconds

    for _ in range(3):
        for kind, samples in times.items():
            samples.append(once(kind))
    benchmark.pedantic(lambda: once("dies"), rounds=1)
    medians = {kind: statistics.median(samples) for kind, samples in times.items()}
    benchmark.extra_info |= {f"{kind}_s": median for kind, median in medians.items()}
    benchmark.extra_info |= {"ratio": medians["relay"] / medians["bare"]}
    benchmark.extra_info |= {
        f"{kind}, more seconds": medians[kind] - medians["relay"] for kind in ("dies", "falls silent")
    }


def _digest(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()
