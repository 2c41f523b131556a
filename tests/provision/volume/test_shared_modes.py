"""Tests the modes and groups of what setup makes on a shared volume, under several umasks and as another user."""

from __future__ import annotations

import os
import stat
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.layout import Root
from provision.models import hf_listing
from tests.provision import hub_server
from tests.provision.model_pulls import FILES, REPO, is_complete, pull_of, run
from tests.provision.run_command import process, provision

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.provision.http_server import Server

OTHER_USER = "65534"
GROUP = 4321

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root for another user")


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the umask to the test's parameter, and restore the earlier umask afterwards."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def hub(serve: Any) -> Server:
    server: Server = hub_server.start(serve, REPO, FILES)
    return server


@pytest.fixture
def shared(other_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with mode 2775 and the group GROUP, which new entries get; the users of the group are trusted."""
    monkeypatch.setenv("FIRSTLIGHT_TRUST_VOLUME", "1")
    os.chown(other_disk, -1, GROUP)
    other_disk.chmod(0o2775)
    return other_disk


def as_other(*argv: object) -> subprocess.CompletedProcess[bytes]:
    """Run a program as another user without supplementary groups, and return its output and exit code."""
    words = ["setpriv", "--reuid", OTHER_USER, "--regid", OTHER_USER, "--clear-groups", *map(str, argv)]
    return subprocess.run(words, check=False, capture_output=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct, indirect=True)
def test_setup_on_a_shared_volume_makes_folders_with_modes_of_the_umask_and_its_group(
    home: Path, shared: Path, envs: Path, umask: int
) -> None:
    (home / "host.toml").write_text('env = "diffusers"\nmodels = []\nrelocate = ["huggingface"]\nmirror = "keep"\n')
    words = ["--root", shared, "--envs", envs, "--host", home / "host.toml", "--offline"]
    completed = provision("setup", *words)
    assert (home / ".cache/huggingface/hub").is_symlink(), completed.stdout + completed.stderr
    root = Root(shared)
    for folder in (root.state, root.cache, root.cache / "huggingface", root.hub, root.hub.with_name("xet")):
        assert mode(folder) == 0o2777 & ~umask, folder
        assert folder.stat().st_gid == GROUP, folder
    for file in (root.marker, root.links, root.capabilities):
        assert mode(file) == 0o666 & ~umask, file
    for folder in (root.journal, root.journal.with_name("backup")):
        assert mode(folder) & 0o777 == 0o700, folder
    is_readable = umask != 0o077
    assert (as_other("ls", root.hub).returncode == 0) is is_readable
    assert as_other("ls", root.journal).returncode != 0


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o002], ids=oct, indirect=True)
def test_records_of_a_volume_that_is_not_shared_are_private(home: Path, other_disk: Path, umask: int) -> None:
    other_disk.chmod(0o755)
    (home / "data").mkdir()
    (home / "data").chmod(0o755)
    completed = process("relocate", home / "data", "--to", "moved", "--root", other_disk / "root")
    assert completed.returncode == 0, completed.stderr
    root = Root(other_disk / "root")
    assert mode(root.state) == 0o700
    assert as_other("cat", root.links).returncode != 0
    entries = [path for path in root.path.rglob("*") if not path.is_symlink()]
    assert [path for path in entries if mode(path) & 0o002] == [root.lock], "every user may take a lock"


@pytest.mark.parametrize("umask", [0o022, 0o002], ids=oct, indirect=True)
def test_another_user_can_read_a_model_that_was_pulled_to_a_shared_volume(
    shared: Path, hub: Server, umask: int
) -> None:
    root = Root(shared)
    root.hub.mkdir(parents=True)
    work = pull_of(root, hub.url)
    run(work)
    assert is_complete(work)
    for path in [root.hub, *root.hub.rglob("*")]:
        if path.is_symlink():
            continue
        is_lock = ".locks" in path.parts and path.is_file()
        expected = 0o666 if is_lock else 0o2777 & ~umask if path.is_dir() else 0o666 & ~umask
        assert oct(mode(path)) == oct(expected), path
        assert path.lstat().st_gid == GROUP, path
    for name, content in FILES.items():
        assert as_other("cat", work.snapshot / name).stdout == content


def test_relocated_folder_gets_the_group_of_the_volume_and_keeps_its_modes(home: Path, shared: Path) -> None:
    (home / "data/deep").mkdir(parents=True)
    (home / "data/deep/file").write_text("mine")
    (home / "data/deep").chmod(0o750)
    (home / "data").chmod(0o755)
    assert provision("relocate", home / "data", "--to", "moved", "--root", shared).returncode == 0
    moved = shared / "moved"
    assert [oct(mode(path)) for path in (moved, moved / "deep")] == ["0o2755", "0o2750"]
    assert {path.stat().st_gid for path in (moved, moved / "deep", moved / "deep/file")} == {GROUP}
    assert provision("undo", "--root", shared).returncode == 0
    assert [oct(mode(path)) for path in (home / "data", home / "data/deep")] == ["0o755", "0o750"]
    assert {path.stat().st_gid for path in (home / "data", home / "data/deep/file")} == {os.getegid()}


def test_private_folder_of_the_home_stays_private_on_the_volume(home: Path, shared: Path) -> None:
    (home / "data").mkdir(mode=0o700)
    (home / "data/secret").write_text("mine")
    assert provision("relocate", home / "data", "--to", "moved", "--root", shared).returncode == 0
    assert mode(shared / "moved") & 0o777 == 0o700
    assert as_other("cat", shared / "moved/secret").returncode != 0


def test_journal_folder_of_an_earlier_version_becomes_private(home: Path, shared: Path) -> None:
    root = Root(shared)
    root.journal.mkdir(parents=True)
    root.journal.chmod(0o755)
    (home / "data").mkdir()
    assert provision("relocate", home / "data", "--to", "moved", "--root", shared).returncode == 0
    assert mode(root.journal) & 0o777 == 0o700


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct, indirect=True)
def test_listing_that_huggingface_hub_wrote_gets_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    tree = tmp_path / "trees/a.json"
    tree.parent.mkdir()
    tree.touch()
    tree.chmod(0o600)
    hf_listing.open_listings(tmp_path)
    assert mode(tree) == 0o666 & ~umask


def test_model_is_pulled_once_to_a_volume_that_cannot_store_links(home: Path, limited: object, hub: Server) -> None:
    assert callable(limited)
    root = Root(limited("no-symlink"))
    root.hub.mkdir(parents=True)
    work = pull_of(root, hub.url)
    run(work)
    assert is_complete(work)
    assert not any(path.is_symlink() for path in root.hub.rglob("*"))
    run(work)  # nothing is downloaded again
    assert is_complete(work)
    assert len([path for path in root.hub.rglob("*") if path.is_file() and path.name == "model.safetensors"]) == 2
