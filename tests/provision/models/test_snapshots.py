"""The hub cache's snapshots and refs, rebuilt from its blobs as the client itself reads them."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import snapshot_download

from provision.config import models as models_config
from provision.config import toml
from provision.core.layout import Root
from provision.core.step import State
from provision.models.snapshots import SnapshotStep, link
from provision.volume.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable
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


def step(root: Root, *models: models_config.ModelSpec) -> SnapshotStep:
    return SnapshotStep(root, models, Journal(root.journal))


def repo(root: Root) -> Path:
    return root.hub / "models--owner--model"


def manifest(hub: FakeHub, tmp_path: Path) -> models_config.ModelSpec:
    (tmp_path / "models.toml").write_text(hub.manifest())
    return toml.load_tables(tmp_path / "models.toml", models_config.ModelSpec)["model"]


def heal(found: SnapshotStep) -> None:
    """Apply once; a second look has nothing to write."""
    assert found.check().state is State.DRIFTED
    found.apply()
    assert found.check().state is State.OK
    written = found.root.journal.stat().st_mtime_ns
    found.apply()
    assert found.root.journal.stat().st_mtime_ns == written


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
    model = manifest(hub, tmp_path)
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


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"format_version": 99, "files": {}}', '{"format_version": 1, "files": 3}', "[" * 10**5],
    ids=["empty", "nothing", "another format", "no files", "too deep"],
)
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
    assert step(root, manifest(hub, tmp_path)).check().state is State.DRIFTED


def test_one_of_two_names_of_a_blob_comes_back(root: Root, hub: FakeHub) -> None:
    """As in SDXL, whose two tokenizers share a vocabulary."""
    step(root).apply()
    tree = next((repo(root) / "trees").iterdir())
    listing = json.loads(tree.read_text())
    listing["files"]["second/config.json"] = listing["files"]["config.json"]
    tree.write_text(json.dumps(listing))
    heal(step(root))
    second = repo(root) / "snapshots" / hub.revision / "second/config.json"
    assert second.read_bytes() == hub.files["config.json"]


def test_a_link_that_leads_nowhere_is_no_name(root: Root, hub: FakeHub) -> None:
    """A whole cache that was moved, with links from the top."""
    step(root).apply()
    named = [path for path in (repo(root) / "snapshots").rglob("*") if path.is_symlink()]
    for path in named:
        blob = path.readlink().name
        path.unlink()
        path.symlink_to(f"/old/place/blobs/{blob}")
    heal(step(root))
    loads(root, hub)


@pytest.mark.parametrize("text", ["", "9" * 40, "main", "../blobs", "\xff"])
def test_a_main_that_leads_nowhere_is_named_anew(root: Root, hub: FakeHub, text: str) -> None:
    step(root).apply()
    (repo(root) / "refs/main").write_text(text, encoding="latin-1")
    heal(step(root))
    loads(root, hub)


def test_a_dead_main_names_what_the_manifest_pins(root: Root, hub: FakeHub, tmp_path: Path) -> None:
    step(root).apply()
    other = "b" * 40
    shutil.copytree(repo(root) / "snapshots" / hub.revision, repo(root) / "snapshots" / other, symlinks=True)
    tree = repo(root) / "trees" / f"{hub.revision}.json"
    shutil.copy(tree, tree.with_stem(other))
    os.utime(tree, (1, 1))  # the other one is the younger
    (repo(root) / "refs/main").write_text("9" * 40)
    heal(step(root, manifest(hub, tmp_path)))
    assert (repo(root) / "refs/main").read_text() == hub.revision
    (repo(root) / "refs/main").write_text(other)
    assert step(root, manifest(hub, tmp_path)).check().state is State.OK, "a main that leads somewhere is somebody's"
    (repo(root) / "refs/main").write_text(f"{other}\n")
    heal(step(root, manifest(hub, tmp_path)))
    assert (repo(root) / "refs/main").read_text() == other, "the client takes every byte, also the end of a line"


def test_another_ref_needs_no_main(root: Root) -> None:
    step(root).apply()
    (repo(root) / "refs/main").rename(repo(root) / "refs/v1.0")
    assert step(root).check().state is State.OK


@pytest.mark.parametrize("left", ["nothing", "empty folders"])
def test_a_snapshot_that_somebody_removed_stays_away(root: Root, hub: FakeHub, tmp_path: Path, left: str) -> None:
    """Its blobs live on by another revision."""
    step(root).apply()
    old, new = (repo(root) / "snapshots" / commit for commit in (hub.revision, "b" * 40))
    old.rename(new)
    (repo(root) / "refs/main").write_text(new.name)
    if left == "empty folders":
        (old / "unet").mkdir(parents=True)
    assert step(root, manifest(hub, tmp_path)).check().state is State.OK
    assert not [path for path in old.rglob("*") if not path.is_dir()]


def test_a_pinned_blob_without_a_size_is_known_by_its_name(root: Root, hub: FakeHub, tmp_path: Path) -> None:
    """As the weights of ddpm-cat-256 are; what the listing tells of the size holds all the same."""
    model = manifest(hub, tmp_path)
    files = [file.model_copy(update={"size": None}) for file in model.files if file.path == "model.safetensors"]
    unsized = model.model_copy(update={"files": files})
    shutil.rmtree(repo(root) / "snapshots")
    blob = repo(root) / "blobs" / str(files[0].sha256)
    blob.write_bytes(b"cut")
    step(root, unsized).apply()
    named = repo(root) / "snapshots" / hub.revision / "model.safetensors"
    assert not named.is_symlink()
    blob.write_bytes(hub.files["model.safetensors"])
    shutil.rmtree(repo(root) / "trees")
    heal(step(root, unsized))
    assert named.read_bytes() == hub.files["model.safetensors"]


def together(*works: Callable[[], None]) -> None:
    """Run them at the same time; the first fault is raised."""
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], None]) -> None:
        barrier.wait()
        work()

    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(begin, work) for work in works]:
            done.result()


def test_two_runs_that_link_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        files = [(f"unet/{index}.json", f"{index:040x}") for index in range(30)]
        snapshot = folder / "snapshots" / "a" / "unet"
        snapshot.mkdir(parents=True)
        for index in range(0, 30, 3):
            (snapshot / f"{index}.json").write_text("a copy")
            (snapshot / f"{index + 1}.json").symlink_to("nowhere")
        together(*[lambda: link(folder, "a", files)] * 3)  # noqa: B023 (they end in this round)
        for path, blob in files:
            assert str((folder / "snapshots/a" / path).readlink()) == f"../../../blobs/{blob}"
        copies = list(snapshot.glob("*.firstlight-corrupt"))
        assert [path.read_text() for path in copies if not path.is_symlink()] == ["a copy"] * 10
        assert len(list(folder.rglob("*"))) == 3 + 30 + 10, "nothing else is left"


def test_a_link_that_is_right_is_left_as_it_is(tmp_path: Path) -> None:
    link(tmp_path, "a", [("x.json", "1" * 40), ("y.json", "2" * 40)])
    right, wrong = (tmp_path / "snapshots/a" / name for name in ("x.json", "y.json"))
    before = right.lstat()
    link(tmp_path, "a", [("x.json", "1" * 40), ("y.json", "3" * 40)])
    assert right.lstat() == before
    assert wrong.readlink().name == "3" * 40
