"""Provides the compiled recorder of writes, a folder for the scenarios, and a function that records a scenario."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.provision import hub_server
from tests.provision.http_server import Server
from tests.torture import all_scenarios, pull_scenario, write_log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.torture.all_scenarios import Recorded


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the recorder of writes (recorder.c) and return the path of the library."""
    if sys.platform != "linux":
        pytest.skip("the recorder of writes works on Linux only")
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing, and the recorder of writes is compiled with it")
    return write_log.build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """Return an empty folder in /dev/shm, or on disk without one: the tests write thousands of folder trees."""
    memory = Path("/dev/shm")  # noqa: S108 (mkdtemp makes a folder with a unique name in it)
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def record(library: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Recorded]]:
    """Return a function that records the scenario with a name; for a pull, it starts a hub on loopback."""
    servers: list[Server] = []

    def recording(name: str) -> Any:
        if name in pull_scenario.PULL and not servers:
            content, headers = hub_server.served(pull_scenario.REPO, pull_scenario.FILES)
            servers.append(Server(content))
            servers[0].headers = headers
            monkeypatch.setenv("HF_ENDPOINT", servers[0].url)
        return all_scenarios.recorded(name, library, base)

    yield recording
    for server in servers:
        server.close()
