"""Compares a pull with huggingface_hub and curl, and a verification with hashlib; measures a repair of 100 files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from provision.core.layout import Root
from provision.models import manifest, snapshots, verify
from provision.models.verify import Depth
from provision.volume.journal import Journal
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

REPO, REVISION = "owner/large", "3" * 40
COUNT, SIZE = 8, 128 << 20
SERVE = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from provision.models import seed_server
snapshot = Path(sys.argv[2])
names = [path.name for path in snapshot.iterdir()]
server = seed_server.server([seed_server.served(sys.argv[3], snapshot.name, "mit", snapshot, names)], "127.0.0.1", 0)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
PULL = """
import re, time
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from provision.models import manifest
from provision.core.layout import Root
from provision.models.pull import Pull
from provision.models.hubs import Hubs
root = Root(Path(sys.argv[2]))
spec = manifest.load(root.path / "models.toml").pick("large")
work = Pull(root, "large", spec, Hubs(root, {"HF_ENDPOINT": sys.argv[3]}))
began = time.perf_counter()
work.run(work.plan(), lambda *_: None)
took = time.perf_counter() - began
status = Path("/proc/self/status").read_text()
print(work.arrived, took, re.search(r"VmHWM:\\s+(\\d+)", status).group(1))
"""
CLIENT = """
import sys, time; from huggingface_hub import snapshot_download
began = time.perf_counter()
snapshot_download(sys.argv[1], revision=sys.argv[2], cache_dir=sys.argv[3], endpoint=sys.argv[4], token=False)
print(time.perf_counter() - began)
"""
CHECK = """
import re, sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from provision.models import verify as checking; from provision.models import manifest
spec = manifest.load(Path(sys.argv[2])).pick("large")
assert {each.state for each in checking.check_files(Path(sys.argv[3]), spec.files, checking.Depth.HASH)} == {"ok"}
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
"""


@pytest.fixture
def memory() -> Iterator[Path]:
    """Yield a folder in /dev/shm, so that the speed of the disk does not affect the comparison."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """Serve eight files of 128 MiB from another process; yield (its address, text of a manifest, snapshot folder)."""
    folder = tmp_path_factory.mktemp("large") / f"models--{REPO.replace('/', '--')}"
    rows, links = [], []
    (folder / "blobs").mkdir(parents=True)
    for number in range(COUNT):
        content = os.urandom(1 << 20) * (SIZE >> 20)
        digest = hashlib.sha256(content).hexdigest()
        (folder / "blobs" / digest).write_bytes(content)
        links.append((f"w{number}.safetensors", digest))
        rows.append(f'{{path = "w{number}.safetensors", size = {SIZE}, sha256 = "{digest}"}}')
    snapshots.link(folder, REVISION, links)
    text = f'[large]\nrepo = "{REPO}"\nrevision = "{REVISION}"\nlicense = "mit"\narchitecture = "x"\n'
    snapshot = folder / "snapshots" / REVISION
    argv = [sys.executable, "-c", SERVE, str(CHECKOUT), str(snapshot), REPO]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}", f"{text}files = [{', '.join(rows)}]\n", snapshot
        server.kill()
    shutil.rmtree(folder.parent)


def volume(tmp_path: Path, name: str, text: str) -> Root:
    root = Root(tmp_path / name)
    root.state.mkdir(parents=True)
    root.hub.mkdir(parents=True)
    (root.path / "models.toml").write_text(text)
    return root


def python(script: str, *argv: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, argv)]


def test_rate_of_a_pull_against_huggingface_hub_and_curl(
    benchmark: BenchmarkFixture, large: tuple[str, str, Path], memory: Path
) -> None:
    # The three programs alternate, each in a new process. The start of Python is not counted, except in "ours whole".
    # Only firstlight hashes the content.
    url, text, _ = large
    seconds: dict[str, list[float]] = {"ours": [], "client": [], "curl": [], "ours whole": []}
    peak = []

    def once() -> None:
        root = volume(memory, "root", text)
        began = time.perf_counter()
        done = subprocess.run(python(PULL, CHECKOUT, root.path, url), check=True, capture_output=True, text=True)
        seconds["ours whole"].append(time.perf_counter() - began)
        arrived, elapsed, peak_kib = done.stdout.split()
        assert int(arrived) == COUNT * SIZE
        seconds["ours"].append(float(elapsed))
        peak.append(int(peak_kib) / 1024)
        shutil.rmtree(root.path)
        client = subprocess.run(
            python(CLIENT, REPO, REVISION, memory / "hub", url),
            check=True,
            capture_output=True,
            text=True,
            env=dict(os.environ) | {"HF_HUB_DISABLE_XET": "1"},
        )
        seconds["client"].append(float(client.stdout))
        shutil.rmtree(memory / "hub")
        (memory / "curl").mkdir()
        files = [f"{url}/{REPO}/resolve/{REVISION}/w{number}.safetensors" for number in range(COUNT)]
        words = [word for file in files for word in ("-o", str(memory / "curl" / file.rpartition("/")[2]), file)]
        began = time.perf_counter()
        subprocess.run(["curl", "-sS", "-Z", "--parallel-max", "8", *words], check=True, capture_output=True)
        seconds["curl"].append(time.perf_counter() - began)
        shutil.rmtree(memory / "curl")

    benchmark.pedantic(once, rounds=5)
    rates = {name: COUNT * SIZE / 1e6 / statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info.update({f"{name}_mb_per_s": round(rate) for name, rate in rates.items()})
    benchmark.extra_info["times_the_client"] = round(rates["ours"] / rates["client"], 2)
    benchmark.extra_info["times_curl"] = round(rates["ours"] / rates["curl"], 2)
    benchmark.extra_info["peak_mib"] = round(max(peak))
    print(json.dumps(benchmark.extra_info))


def test_share_of_a_model_that_a_pull_fetches_again_after_a_kill_at_90_percent(
    benchmark: BenchmarkFixture, large: tuple[str, str, Path], tmp_path: Path
) -> None:
    # The first process is killed with SIGKILL; the second one counts the bytes that it downloads.
    url, text, _ = large
    shares = []

    def once() -> None:
        root = volume(tmp_path, "root", text)
        killing = PULL.replace(
            "work.run(work.plan(), lambda *_: None)",
            "import os, signal\n"
            "def report(path, count):\n"
            f"    if work.arrived >= 0.9 * {COUNT * SIZE}: os.kill(os.getpid(), signal.SIGKILL)\n"
            "work.run(work.plan(), report)",
        )
        done = subprocess.run(python(killing, CHECKOUT, root.path, url), check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL
        again = subprocess.run(python(PULL, CHECKOUT, root.path, url), check=True, capture_output=True, text=True)
        shares.append(int(again.stdout.split()[0]) / (COUNT * SIZE))
        shutil.rmtree(root.path)

    benchmark.pedantic(once, rounds=3)
    benchmark.extra_info["fetched_again"] = round(max(shares), 4)
    print(json.dumps(benchmark.extra_info))


def test_time_of_verifying_a_model_against_hashlib_in_threads(
    benchmark: BenchmarkFixture, large: tuple[str, str, Path], tmp_path: Path
) -> None:
    # Both sides use threads, and alternate. The hashlib side hashes bytes that are in memory already.
    _, text, snapshot = large
    spec = manifest.load(volume(tmp_path, "root", text).path / "models.toml").pick("large")
    block = bytes(SIZE)
    cores = len(os.sched_getaffinity(0))
    ours, bare = [], []

    def once() -> None:
        began = time.perf_counter()
        assert {file.state for file in verify.check_files(snapshot, spec.files, Depth.HASH)} == {"ok"}
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda _: hashlib.sha256(block).digest(), range(COUNT)))
        bare.append(time.perf_counter() - began)

    benchmark.pedantic(once, rounds=5)
    benchmark.extra_info["share_of_bare_sha256"] = round(statistics.median(bare) / statistics.median(ours), 3)
    argv = python(CHECK, CHECKOUT, tmp_path / "root/models.toml", snapshot)
    peak = int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout) / 1024
    benchmark.extra_info["peak_mib"] = round(peak)
    benchmark.extra_info["mb_per_s"] = round(COUNT * SIZE / 1e6 / statistics.median(ours))
    print(json.dumps(benchmark.extra_info))


def test_time_of_repairing_the_links_of_100_model_files(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    # The cache has blobs and the list of files (trees/), but no refs and no snapshot links; the repair makes both.
    contents = {f"part{number}/config.json": json.dumps(number).encode() for number in range(100)}
    rows = {
        path: hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        for path, content in contents.items()
    }
    seconds = []

    def once() -> None:
        root = volume(tmp_path, "root", "")
        repo = root.hub / "models--owner--many"
        (repo / "blobs").mkdir(parents=True)
        for path, blob in rows.items():
            (repo / "blobs" / blob).write_bytes(contents[path])
        files = {path: {"blob_id": blob, "size": len(contents[path])} for path, blob in rows.items()}
        (repo / "trees").mkdir()
        (repo / "trees" / f"{REVISION}.json").write_text(json.dumps({"format_version": 1, "files": files}))
        step = snapshots.SnapshotStep(root, [], Journal(root.journal, "models verify"))
        began = time.perf_counter()
        step.apply()
        seconds.append(time.perf_counter() - began)
        for path, content in contents.items():
            assert (repo / "snapshots" / REVISION / path).read_bytes() == content
        assert (repo / "refs/main").read_text() == REVISION
        shutil.rmtree(root.path)

    benchmark.pedantic(once, rounds=5)
    benchmark.extra_info["repair_seconds"] = round(statistics.median(seconds), 4)
    print(json.dumps(benchmark.extra_info))
