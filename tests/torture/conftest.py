"""The recorder, a place in memory where scenarios play, and the hub that one of them asks."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.provision import hub_server
from tests.provision.http_server import Played
from tests.torture import all_scenarios, pull_scenario, write_log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.torture.all_scenarios import Recorded


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorder of writes, compiled."""
    if sys.platform != "linux":
        pytest.skip("the recorder of writes is for Linux")
    if shutil.which("gcc") is None:
        pytest.skip("the recorder of writes is compiled with gcc, which is not here")
    return write_log.build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory where the machine has such a place: thousands of trees are written there."""
    memory = Path("/dev/shm")  # noqa: S108 (the folder in it has a name of its own)
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def record(library: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Recorded]]:
    """Record a scenario by its name."""
    played: list[Played] = []

    def recording(name: str) -> Any:
        if name in pull_scenario.PULL and not played:
            content, headers = hub_server.served(pull_scenario.REPO, pull_scenario.FILES)
            played.append(Played(content))
            played[0].headers = headers
            monkeypatch.setenv("HF_ENDPOINT", played[0].url)
        return all_scenarios.recorded(name, library, base)

    yield recording
    for each in played:
        each.close()
