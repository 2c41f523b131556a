"""Provides a temporary home, a block on connections to other machines, and the interpreter that has real torch."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import signal
import socket
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest

from tests import spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PLAIN = (str, int, float, bool, type(None))
CHECKOUT = Path(__file__).resolve().parent.parent
TEST_ROOT = CHECKOUT / ".cache" / "test-root"
# The machine's environment variables, copied before `_surroundings` removes some of them. Tests that install real
# packages need them: pip's variables name the package index.
MACHINE = dict(os.environ)
# A proxy address on which no server listens, so that child programs cannot connect to other machines.
NOWHERE = "http://127.0.0.1:9"
# Prefixes of the environment variables that change which packages are installed, or what a program computes or prints.
FOREIGN = (
    *("HF_", "HUGGING", "XDG_", "UV_", "PIP_", "CONDA_", "MAMBA_", "VIRTUAL_ENV", "PYTHON", "PYTEST_XDIST_"),
    *("PYTEST_ADDOPTS", "OMP_", "MKL_", "KMP_", "TORCH", "CUDA_", "NVIDIA_", "NO_COLOR", "FORCE_COLOR", "COLUMNS"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers for `-n auto`: the cores that this process may use, but at least two.

    Many tests wait for a process or a socket, so two workers are faster than one even on a single core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, cores)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests of a file in one worker process, and the files in the order of `spread.longest_first`."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    scheduler = LoadFileScheduling(config, log)
    scheduler._split_scope = spread.group
    return scheduler


def pytest_make_parametrize_id(val: object) -> str | None:
    """Return the id of a test's parameter from its content; None: keep pytest's own id."""
    if isinstance(val, dict):
        return _joined(f"{key}={item}" if isinstance(item, _PLAIN) else str(key) for key, item in val.items())
    if isinstance(val, list | tuple | set | frozenset) and all(isinstance(item, _PLAIN) for item in val):
        return _joined(map(str, sorted(val, key=str) if isinstance(val, set | frozenset) else val))
    if dataclasses.is_dataclass(val) and not isinstance(val, type):
        values = [(field, getattr(val, field.name)) for field in dataclasses.fields(val)]
        changed = [(field, value) for field, value in values if value is not None and value != field.default]
        plain = [(field, value) for field, value in changed if isinstance(value, _PLAIN)]
        required = dataclasses.MISSING
        names = ("" if field.default is required else f"{field.name}=" for field, _ in plain)
        return _joined(f"{name}{value}" for name, (_, value) in zip(names, plain, strict=True)) if plain else None
    if isinstance(val, FunctionType) and val.__name__ != "<lambda>":
        return val.__name__.replace("_", " ")
    return None


def _joined(texts: Iterable[str]) -> str:
    # xdist cannot send a lone surrogate, and an environment variable cannot hold a NUL.
    text = ", ".join(texts)[:60].encode("unicode_escape").decode("ascii")
    return text or "none"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        spread.longest_first(items)


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove this machine's settings from the environment variables before the first test, and set fixed ones.

    SIGINT and SIGHUP get their default handlers: a shell starts background processes with SIGINT ignored, and nohup
    starts a process with SIGHUP ignored, and children would inherit that. Real torch computes with one thread, because
    two workers with one thread per core slow each other down. A test of the number of threads sets that number itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(FOREIGN) or name.lower().endswith("_proxy"):
                patch.delenv(name)
        # Files that a killed program leaves are deleted together with the folders of the tests.
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(
            "OMP_WAIT_POLICY", "PASSIVE"
        )  # a thread that waits for the others sleeps, and does not occupy a core
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL) if hasattr(signal, "SIGHUP") else None
        mask = os.umask(0o022)  # the modes of new files depend on the umask; a test of the umask sets its own
        yield
        os.umask(mask)
        signal.signal(signal.SIGINT, handler)
        if hang_up is not None:
            signal.signal(signal.SIGHUP, hang_up)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a temporary home and an empty working folder, and a proxy at which no server listens; return the home."""
    folder = tmp_path / "home"
    work = tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.chdir(work)
    return folder


@pytest.fixture(autouse=True)
def _no_way_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that connects to another machine, even if the tested code catches the connection's error."""
    attempts: list[str] = []
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def allowed(address: Any) -> bool:
        if not isinstance(address, tuple):
            return True  # a Unix socket's path
        return str(address[0]) in {"localhost", "::1", ""} or str(address[0]).startswith("127.")

    def refuse(address: Any) -> None:
        if not allowed(address):
            attempts.append(str(address))
            raise ConnectionRefusedError(f"tests must not connect to other machines: {address}")

    def guarded(self: socket.socket, address: Any) -> None:
        refuse(address)
        connect(self, address)

    def guarded_ex(self: socket.socket, address: Any) -> int:
        refuse(address)
        return connect_ex(self, address)

    def guarded_lookup(host: Any, *rest: Any, **named: Any) -> Any:
        refuse((host.decode() if isinstance(host, bytes) else host or "",))
        return getaddrinfo(host, *rest, **named)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield
    if attempts:
        pytest.fail(f"the test tried to connect to other machines: {', '.join(attempts)}")


@pytest.fixture(scope="session")
def measured_python() -> Path:
    """Return the interpreter of the real environment (torch, diffusers) that `make test` builds in the checkout."""
    python = TEST_ROOT / "envs" / "diffusers" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} does not exist. Run the tests with `make test`, which builds it.")
    return python


@pytest.fixture(scope="session")
def saved_pipelines(
    request: pytest.FixtureRequest, measured_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Save small pipelines with real diffusers, once for all worker processes; return {"sd": folder, "ddpm": folder}.

    No test may change these files.
    """
    from tests.provision import tiny_pipelines

    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent  # the folder of a worker is below the folder of the test run
    folder = base / "saved pipelines"
    with (base / "saved pipelines.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "is complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            tiny_pipelines.save(measured_python, folder)
            (folder / "is complete").touch()
    return {name: folder / name for name in ("sd", "ddpm")}
