"""The hub cache's snapshots and refs, rebuilt from its blobs as the client itself reads them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import snapshot_download

from provision import spec
from provision.journal import Journal
from provision.paths import Root
from provision.snapshots import SnapshotStep
from provision.step import State

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision.conftest import FakeHub


@pytest.fixture
def root(tmp_path: Path, hub: FakeHub) -> Root:
    """A hub cache into which the client has pulled a repository, and a hub that answers no more."""
    found = Root(tmp_path / "root")
    found.hub.mkdir(parents=True)
    snapshot_download(hub.repo, revision=hub.revision, cache_dir=found.hub, endpoint=hub.url)
    hub.faults["status"] = 503
    return found


def step(root: Root, *models: spec.ModelSpec) -> SnapshotStep:
    return SnapshotStep(root, models, Journal(root.journal))


def repo(root: Root) -> Path:
    return root.hub / "models--owner--model"


def loads(root: Root, hub: FakeHub) -> None:
    folder = snapshot_download(hub.repo, cache_dir=root.hub, local_files_only=True)
    from pathlib import Path

    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == hub.files


@pytest.mark.parametrize("lost", [["snapshots"], ["refs"], ["snapshots", "refs"], []])
def test_what_was_wiped_is_rebuilt(root: Root, hub: FakeHub, lost: list[str]) -> None:
    for name in lost:
        shutil.rmtree(repo(root) / name, ignore_errors=True)
    found = step(root)
    assert found.check().state is State.DRIFTED, "a pull by commit leaves no ref, so offline its name leads nowhere"
    found.apply()
    assert found.check().state is State.OK
    loads(root, hub)
    link = repo(root) / "snapshots" / hub.revision / "config.json"
    assert not link.readlink().is_absolute()


def test_without_a_listing_the_manifest_knows(root: Root, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(hub.manifest())
    model = spec.load_tables(tmp_path / "models.toml", spec.ModelSpec)["model"]
    for name in ("snapshots", "trees"):
        shutil.rmtree(repo(root) / name)
    (repo(root) / "blobs").rename(repo(root) / "old")
    (repo(root) / "blobs").mkdir()
    for file in model.files:  # as our own pull names them
        old = next(each for each in (repo(root) / "old").iterdir() if each.stat().st_size == file.size)
        shutil.copy(old, repo(root) / "blobs" / str(file.sha256))
    assert step(root).check().state is State.OK, "nothing is known of the blobs"
    found = step(root, model)
    assert found.check().state is State.DRIFTED
    found.apply()
    loads(root, hub)


def test_a_blob_of_the_wrong_size_gets_no_name(root: Root, hub: FakeHub) -> None:
    step(root).apply()
    shutil.rmtree(repo(root) / "snapshots")
    for blob in (repo(root) / "blobs").iterdir():
        if blob.stat().st_size > 100:
            blob.write_bytes(b"cut")
    found = step(root)
    found.apply()
    assert [path.name for path in (repo(root) / "snapshots" / hub.revision).iterdir()] == ["config.json"]


def test_a_name_that_leads_out_is_not_made(root: Root, hub: FakeHub) -> None:
    tree = next((repo(root) / "trees").iterdir())
    listing = json.loads(tree.read_text())
    listing["files"]["../../../../evil"] = listing["files"].pop("config.json")
    tree.write_text(json.dumps(listing))
    shutil.rmtree(repo(root) / "snapshots")
    step(root).apply()
    assert not list(root.path.rglob("evil"))


@pytest.mark.parametrize("text", ["", "{}", '{"format_version": 99, "files": {}}', '{"format_version": 1, "files": 3}'])
def test_a_listing_that_cannot_be_read_is_passed_over(root: Root, text: str) -> None:
    shutil.rmtree(repo(root) / "snapshots")
    next((repo(root) / "trees").iterdir()).write_text(text)
    assert step(root).check().state is State.OK


def test_a_cache_that_is_not_there(tmp_path: Path) -> None:
    assert step(Root(tmp_path / "none")).check().state is State.OK


def test_in_the_homes_own_cache_only_our_models_are_touched(home: Path, tmp_path: Path, hub: FakeHub) -> None:
    own = home / ".cache/huggingface/hub"
    snapshot_download(hub.repo, revision=hub.revision, cache_dir=own, endpoint=hub.url)
    root = Root(tmp_path / "root")
    assert root.hub_in_use == own
    assert step(root).check().state is State.OK
    (tmp_path / "models.toml").write_text(hub.manifest())
    ours = spec.load_tables(tmp_path / "models.toml", spec.ModelSpec)["model"]
    assert step(root, ours).check().state is State.DRIFTED
