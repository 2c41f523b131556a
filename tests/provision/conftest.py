"""Provides small real parts for tests: wheels, environment definitions, a hub, a channel and an index on loopback."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.layout import Root
from provision.lockfiles import conda_lock
from tests import limited_fs
from tests.provision import conda_channel, silent_server
from tests.provision.fake_hub import FakeHub, handler
from tests.provision.http_server import Fault, RawServer, Server

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

# The parts of torch and diffusers that the smoke test uses; test_real_setup.py installs the real packages.
TORCH = """
__version__ = "9.9+tiny"
class cuda:
    is_available = staticmethod(lambda: False)
class _Tensor:
    def isfinite(self): return self
    def all(self): return True
def manual_seed(seed): pass
def randn(*shape, device): return _Tensor()
class inference_mode:
    def __enter__(self): pass
    def __exit__(self, *_): pass
"""
DIFFUSERS = """
__version__ = "8.8"
import torch
class _Out:
    sample = prev_sample = torch._Tensor()
class UNet2DModel:
    def __init__(self, **_): pass
    def to(self, device): return self
    def eval(self): return self
    def __call__(self, image, step): return _Out
class DDPMScheduler:
    timesteps = [9]
    def set_timesteps(self, count): pass
    def step(self, *_): return _Out
"""


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """Write a pure Python wheel with a correct RECORD, and return its path."""
    info = f"{name}-{version}.dist-info"
    content = dict(files)
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    content[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = []
    for path, text in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text.encode())}")
    rows.append(f"{info}/RECORD,,")
    content[f"{info}/RECORD"] = "\n".join(rows) + "\n"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in content.items():
            archive.writestr(zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0)), text)
    return wheel


def lock_text(*wheels: Path) -> str:
    """Return a lock file for wheels in the format of `provision env lock`: each entry has a marker and a hash."""
    lines = ["# a lock"]
    for wheel in wheels:
        name, version = wheel.name.split("-")[:2]
        lines += [f"{name}=={version} ; sys_platform == '{sys.platform}' \\"]
        lines += [f"    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"]
    return "\n".join(lines) + "\n"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with small wheels of torch and diffusers, which only pip's find-links setting names."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, "torch", "9.9+tiny", {"torch/__init__.py": TORCH, "torch/big.txt": "x" * 20000})
    write_wheel(folder, "diffusers", "8.8", {"diffusers/__init__.py": DIFFUSERS})
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


@pytest.fixture
def envs(tmp_path: Path, wheels: Path) -> Path:
    """Make an envs/ folder with one environment definition, whose lock has the two small wheels."""
    folder = tmp_path / "envs"
    (folder / "diffusers").mkdir(parents=True)
    minors = '["3.10", "3.11", "3.12", "3.13", "3.14"]'
    (folder / "torch.toml").write_text(f'python = {minors}\n[[variant]]\nname = "cpu"\ntorch = "9.9+tiny"\n')
    (folder / "models.toml").write_text("")
    (folder / "diffusers" / "cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Start a hub with two small files, and set HF_ENDPOINT to its URL."""
    served = FakeHub({"config.json": b'{"a": 1}\n', "model.safetensors": bytes(range(256)) * 4096})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(served))
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def channel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a conda channel once for all tests, and return the parent folder of the channel `conda-forge`."""
    folder = tmp_path_factory.mktemp("channel")
    conda_channel.build(folder / "conda-forge")
    return folder


@pytest.fixture
def conda(channel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[conda_channel.FolderServer]:
    """Serve the conda channel on loopback, and set CONDA_CHANNEL_ALIAS to its URL, as conda users set a mirror."""
    served = conda_channel.FolderServer(channel_folder)
    monkeypatch.setenv("CONDA_CHANNEL_ALIAS", served.url)
    yield served
    served.close()


@pytest.fixture
def conda_envs(envs: Path, channel_folder: Path) -> Path:
    """Add a conda lock and an environment.yml to the definition envs/diffusers, and return envs/."""
    packages = conda_channel.locked(channel_folder / "conda-forge", "python", "pip", "hello=1.0")
    text = conda_lock.lock_text(packages, ["conda-forge"], ["environment.yml"])
    (envs / "diffusers/conda-lock.yml").write_text(text)
    (envs / "diffusers/environment.yml").write_text("dependencies:\n- python\n- pip\n- hello=1.0\n")
    return envs


@pytest.fixture
def index(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[conda_channel.FolderServer]:
    """Serve the wheels as an index on loopback; pip's settings name the index instead of the folder."""
    simple = tmp_path / "index"
    for wheel in wheels.glob("*.whl"):
        page = simple / wheel.name.split("-")[0]
        page.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, page)
        links = "".join(f'<a href="{file.name}">{file.name}</a>' for file in sorted(page.glob("*.whl")))
        (page / "index.html").write_text(links)
    served = conda_channel.FolderServer(simple)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    yield served
    served.close()


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a new folder on another file system than that of `tmp_path`."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    if folder.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one file system only")
    yield folder
    subprocess.run(["chmod", "-R", "u+rwx", folder], check=False)
    shutil.rmtree(folder)


@pytest.fixture(params=["same disk", "other disk"])
def volume(request: pytest.FixtureRequest, tmp_path: Path, other_disk: Path) -> Path:
    return tmp_path / "volume" if request.param == "same disk" else other_disk


@pytest.fixture
def source(home: Path) -> Path:
    return home / ".cache/huggingface/hub"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Return a root with a state folder and an empty hub cache, without a marker."""
    root = Root(tmp_path / "root")
    root.state.mkdir(parents=True)
    root.hub.mkdir(parents=True)
    return root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs of 8 MB and 64 inodes, and yield its mount point."""
    mount = tmp_path / "small"
    mount.mkdir()
    options = "size=8m,nr_inodes=64"
    completed = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=False, capture_output=True
    )
    if completed.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Return a function that mounts an empty folder through FUSE with limits of `tests/limited_fs.py`.

    The users of the host are trusted, since with fixed modes each of them can write there.
    """
    monkeypatch.setenv("FIRSTLIGHT_TRUST_VOLUME", "1")
    with contextlib.ExitStack() as stack:

        def mount(*limits: str) -> Path:
            point = Path(tempfile.mkdtemp(prefix="limited-", dir=tmp_path))
            backing = Path(tempfile.mkdtemp(prefix="backing-", dir=tmp_path))
            stack.enter_context(limited_fs.mounted(backing, point, *limits))
            return point

        yield mount


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """Mount an overlayfs whose lower layer has miniconda3/envs/e, as in a container, and yield its mount point."""
    layer, upper, work, merged = (tmp_path / name for name in ("layer", "upper", "work-layer", "merged"))
    for folder in (layer / "miniconda3/envs/e", upper, work, merged):
        folder.mkdir(parents=True)
    (layer / "miniconda3/envs/e/python").write_text("of the image")
    options = f"lowerdir={layer},upperdir={upper},workdir={work}"
    completed = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, merged], check=False, capture_output=True
    )
    if completed.returncode != 0:
        pytest.skip("no right to mount an overlay")
    yield merged
    subprocess.run(["umount", merged], check=True)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that starts a loopback HTTP server with {URL path: content} and faults, until the test ends."""
    silent_server.replace_read_timeout(monkeypatch)
    started: list[Server] = []

    def start(content: dict[str, bytes], *faults: Fault) -> Server:
        started.append(Server(content, *faults))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def serve_raw(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Callable[[RawServer, socket.socket], None]], RawServer]]:
    """Return a function that starts a loopback server whose bytes a script sends, until the test ends."""
    silent_server.replace_read_timeout(monkeypatch)
    started: list[RawServer] = []

    def start(script: Callable[[RawServer, socket.socket], None]) -> RawServer:
        started.append(RawServer(script))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def flags(tmp_path: Path, envs: Path) -> list[object]:
    """Return the flags --root, --envs and --host; the host has one environment, no models and no relocations."""
    (tmp_path / "host.toml").write_text("models = []\nrelocate = []\n")
    return ["--root", tmp_path / "root", "--envs", envs, "--host", tmp_path / "host.toml"]


@pytest.fixture(scope="session")
def flock_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library that replaces flock in a process, and return its path."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("the library that replaces flock needs Linux and gcc")
    library = tmp_path_factory.mktemp("flock") / "flock.so"
    source = Path(__file__).with_name("flock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return library


@pytest.fixture
def set_flock_error(flock_library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes flock in later child processes fail with a named errno, or always succeed ("")."""

    def replace_flock(error: str) -> None:
        monkeypatch.setenv("LD_PRELOAD", str(flock_library))
        monkeypatch.setenv("FLOCK_ERROR", str(getattr(errno, error) if error else 0))

    return replace_flock


@pytest.fixture
def no_flock(set_flock_error: Callable[[str], None]) -> None:
    """Make flock fail with ENOSYS in later child processes, as on a file system without flock."""
    set_flock_error("ENOSYS")


@pytest.fixture
def local_flock(set_flock_error: Callable[[str], None]) -> None:
    """Make flock succeed in later child processes even while another process holds the lock, as on another host."""
    set_flock_error("")
