"""Kills commands of two hosts that share a volume, at random calls and times; checks every byte after each kill."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.provision import hub_server
from tests.provision.http_server import Server
from tests.torture import kill_commands, two_homes
from tests.torture.kill_commands import Commands

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.torture.two_homes import Figures


@pytest.fixture(scope="session")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library that kills its process at a chosen call (killer.c), and return its path."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("the kills need Linux and gcc")
    if subprocess.run(["unshare", "-u", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to give a process another host name")
    library = tmp_path_factory.mktemp("killer") / "killer.so"
    source = Path(__file__).with_name("killer.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", library, source, "-ldl"], check=True, capture_output=True, text=True)
    return library


@pytest.fixture(params=["one disk", "two disks"])
def campaign(request: pytest.FixtureRequest, killer: Path, tmp_path: Path) -> Iterator[Callable[[int, int], Figures]]:
    """Return a function that takes a number of kills and a random seed, makes these kills, and returns the figures."""
    content, headers = hub_server.served(kill_commands.REPO, kill_commands.FILES)
    hub = Server(content)
    hub.headers = headers
    memory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    commands = Commands(tmp_path, killer, hub.url)
    homes = (memory if request.param == "one disk" else tmp_path) / "homes"
    if request.param == "two disks" and memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("the test needs two file systems, and this machine has one")
    yield lambda kills, seed: two_homes.run(commands, homes, memory / "volume", kills=kills, seed=seed)
    commands.close()
    hub.close()
    shutil.rmtree(memory)


def assert_no_violation(figures: Figures) -> None:
    print(figures)
    assert not figures.violations, "\n".join(figures.violations[:10])


def test_no_byte_of_two_homes_is_lost_or_mixed_after_40_kills(campaign: Callable[[int, int], Figures]) -> None:
    assert_no_violation(campaign(40, 1))


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, 3])
def test_no_byte_of_two_homes_is_lost_or_mixed_after_2500_kills(
    campaign: Callable[[int, int], Figures], seed: int
) -> None:
    assert_no_violation(campaign(2500, seed))
