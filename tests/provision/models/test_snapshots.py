"""Tests the repair of snapshots and refs from the blobs; huggingface_hub loads the repaired repository."""

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

    from tests.provision.fake_hub import FakeHub


@pytest.fixture
def root(tmp_path: Path, hub: FakeHub) -> Root:
    """Return a root with a repository that huggingface_hub has downloaded; the hub now fails."""
    volume_root = Root(tmp_path / "root")
    volume_root.hub.mkdir(parents=True)
    snapshot_download(hub.repo, revision=hub.revision, cache_dir=volume_root.hub, endpoint=hub.url)
    hub.faults["status"] = 503
    return volume_root


def step(root: Root, *models: models_config.ModelSpec) -> SnapshotStep:
    """Return the step that repairs the hub cache of a root; `models` are those of the manifest."""
    return SnapshotStep(root, models, Journal(root.journal))


def repo(root: Root) -> Path:
    return root.hub / "models--owner--model"


def manifest(hub: FakeHub, tmp_path: Path) -> models_config.ModelSpec:
    """Return the entry of the hub's model in a manifest that pins its files."""
    (tmp_path / "models.toml").write_text(hub.manifest())
    return toml.load_tables(tmp_path / "models.toml", models_config.ModelSpec)["model"]


def repair_once(step_to_apply: SnapshotStep) -> None:
    """Apply a drifted step; assert that its state is ok afterwards and that a second application writes nothing."""
    assert step_to_apply.check().state is State.DRIFTED
    step_to_apply.apply()
    assert step_to_apply.check().state is State.OK
    mtime = step_to_apply.root.journal.stat().st_mtime_ns
    step_to_apply.apply()
    assert step_to_apply.root.journal.stat().st_mtime_ns == mtime


def assert_loads(root: Root, hub: FakeHub) -> None:
    """Assert that huggingface_hub loads the repository offline by its id, and that all files are right."""
    folder = snapshot_download(hub.repo, cache_dir=root.hub, local_files_only=True)
    from pathlib import Path

    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == hub.files


@pytest.mark.parametrize(
    "lost", [["snapshots"], ["refs"], ["snapshots", "refs"], []], ids=lambda names: " and ".join(names) or "nothing"
)
def test_lost_snapshots_and_refs_are_rebuilt(root: Root, hub: FakeHub, lost: list[str]) -> None:
    for name in lost:
        shutil.rmtree(repo(root) / name, ignore_errors=True)
    repair = step(root)
    assert repair.check().state is State.DRIFTED, (
        "a download by commit sets no ref, so that the repository cannot be loaded offline"
    )
    repair.apply()
    assert repair.check().state is State.OK
    assert_loads(root, hub)
    link = repo(root) / "snapshots" / hub.revision / "config.json"
    assert not link.readlink().is_absolute()


def test_snapshot_without_a_listing_is_rebuilt_from_the_manifest(root: Root, hub: FakeHub, tmp_path: Path) -> None:
    model = manifest(hub, tmp_path)
    for name in ("snapshots", "trees"):
        shutil.rmtree(repo(root) / name)
    (repo(root) / "blobs").rename(repo(root) / "old")
    (repo(root) / "blobs").mkdir()
    for file in model.files:  # `models pull` names a blob by its sha256
        old_blob = next(blob for blob in (repo(root) / "old").iterdir() if blob.stat().st_size == file.size)
        shutil.copy(old_blob, repo(root) / "blobs" / str(file.sha256))
    assert step(root).check().state is State.OK, "without a listing or a manifest nothing names the files of the blobs"
    repair = step(root, model)
    assert repair.check().state is State.DRIFTED
    repair.apply()
    assert_loads(root, hub)


def test_blob_of_the_wrong_size_gets_no_snapshot_link(root: Root, hub: FakeHub) -> None:
    step(root).apply()
    shutil.rmtree(repo(root) / "snapshots")
    for blob in (repo(root) / "blobs").iterdir():
        if blob.stat().st_size > 100:
            blob.write_bytes(b"cut")
    repair = step(root)
    repair.apply()
    assert [path.name for path in (repo(root) / "snapshots" / hub.revision).iterdir()] == ["config.json"]


def test_listed_path_outside_of_the_snapshot_gets_no_link(root: Root, hub: FakeHub) -> None:
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
def test_invalid_stored_listing_is_ignored(root: Root, text: str) -> None:
    shutil.rmtree(repo(root) / "snapshots")
    next((repo(root) / "trees").iterdir()).write_text(text)
    assert step(root).check().state is State.OK


def test_check_of_a_missing_hub_cache_is_ok(tmp_path: Path) -> None:
    assert step(Root(tmp_path / "none")).check().state is State.OK


def test_only_models_of_the_manifest_are_repaired_in_the_home_cache(home: Path, tmp_path: Path, hub: FakeHub) -> None:
    own = home / ".cache/huggingface/hub"
    snapshot_download(hub.repo, revision=hub.revision, cache_dir=own, endpoint=hub.url)
    root = Root(tmp_path / "root")
    assert root.hub_in_use == own
    assert step(root).check().state is State.OK
    assert step(root, manifest(hub, tmp_path)).check().state is State.DRIFTED


def test_lost_second_snapshot_link_to_one_blob_is_rebuilt(root: Root, hub: FakeHub) -> None:
    """Link one blob twice, as for the two tokenizers of SDXL, which have the same vocabulary."""
    step(root).apply()
    tree = next((repo(root) / "trees").iterdir())
    listing = json.loads(tree.read_text())
    listing["files"]["second/config.json"] = listing["files"]["config.json"]
    tree.write_text(json.dumps(listing))
    repair_once(step(root))
    second = repo(root) / "snapshots" / hub.revision / "second/config.json"
    assert second.read_bytes() == hub.files["config.json"]


def test_dangling_snapshot_links_of_a_moved_cache_are_replaced(root: Root, hub: FakeHub) -> None:
    """Give the snapshot absolute links to the earlier place of the cache."""
    step(root).apply()
    links = [path for path in (repo(root) / "snapshots").rglob("*") if path.is_symlink()]
    for path in links:
        blob = path.readlink().name
        path.unlink()
        path.symlink_to(f"/old/place/blobs/{blob}")
    repair_once(step(root))
    assert_loads(root, hub)


@pytest.mark.parametrize("text", ["", "9" * 40, "main", "../blobs", "\xff"])
def test_invalid_refs_main_is_replaced_by_the_present_revision(root: Root, hub: FakeHub, text: str) -> None:
    step(root).apply()
    (repo(root) / "refs/main").write_text(text, encoding="latin-1")
    repair_once(step(root))
    assert_loads(root, hub)


def test_invalid_refs_main_beside_two_revisions_is_set_to_the_pinned_one(
    root: Root, hub: FakeHub, tmp_path: Path
) -> None:
    step(root).apply()
    other = "b" * 40
    shutil.copytree(repo(root) / "snapshots" / hub.revision, repo(root) / "snapshots" / other, symlinks=True)
    tree = repo(root) / "trees" / f"{hub.revision}.json"
    shutil.copy(tree, tree.with_stem(other))
    os.utime(tree, (1, 1))  # the other listing is newer
    (repo(root) / "refs/main").write_text("9" * 40)
    repair_once(step(root, manifest(hub, tmp_path)))
    assert (repo(root) / "refs/main").read_text() == hub.revision
    (repo(root) / "refs/main").write_text(other)
    assert step(root, manifest(hub, tmp_path)).check().state is State.OK, "a valid refs/main is not changed"
    (repo(root) / "refs/main").write_text(f"{other}\n")
    repair_once(step(root, manifest(hub, tmp_path)))
    assert (repo(root) / "refs/main").read_text() == other, "huggingface_hub reads refs/main with its line end"


def test_repository_with_another_ref_needs_no_refs_main(root: Root) -> None:
    step(root).apply()
    (repo(root) / "refs/main").rename(repo(root) / "refs/v1.0")
    assert step(root).check().state is State.OK


@pytest.mark.parametrize("rest", ["nothing", "empty folders"])
def test_removed_snapshot_is_not_rebuilt_from_the_blobs_of_another_revision(
    root: Root, hub: FakeHub, tmp_path: Path, rest: str
) -> None:
    """Rename the snapshot to another revision, which then uses all blobs."""
    step(root).apply()
    old, new = (repo(root) / "snapshots" / commit for commit in (hub.revision, "b" * 40))
    old.rename(new)
    (repo(root) / "refs/main").write_text(new.name)
    if rest == "empty folders":
        (old / "unet").mkdir(parents=True)
    assert step(root, manifest(hub, tmp_path)).check().state is State.OK
    assert not [path for path in old.rglob("*") if not path.is_dir()]


def test_blob_pinned_without_a_size_is_found_by_its_name_and_linked(root: Root, hub: FakeHub, tmp_path: Path) -> None:
    """Pin a file without its size, as the weights of ddpm-cat-256 are; the size in the listing still applies."""
    model = manifest(hub, tmp_path)
    files = [file.model_copy(update={"size": None}) for file in model.files if file.path == "model.safetensors"]
    unsized = model.model_copy(update={"files": files})
    shutil.rmtree(repo(root) / "snapshots")
    blob = repo(root) / "blobs" / str(files[0].sha256)
    blob.write_bytes(b"cut")
    step(root, unsized).apply()
    linked = repo(root) / "snapshots" / hub.revision / "model.safetensors"
    assert not linked.is_symlink()
    blob.write_bytes(hub.files["model.safetensors"])
    shutil.rmtree(repo(root) / "trees")
    repair_once(step(root, unsized))
    assert linked.read_bytes() == hub.files["model.safetensors"]


def run_in_parallel(*functions: Callable[[], None]) -> None:
    """Run functions in one thread each, started at the same time, and raise the first error."""
    barrier = threading.Barrier(len(functions))

    def begin(function: Callable[[], None]) -> None:
        barrier.wait()
        function()

    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(begin, function) for function in functions]:
            future.result()


def test_three_threads_that_make_the_same_snapshot_links_make_each_link_right(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        files = [(f"unet/{index}.json", f"{index:040x}") for index in range(30)]
        snapshot = folder / "snapshots" / "a" / "unet"
        snapshot.mkdir(parents=True)
        for index in range(0, 30, 3):
            (snapshot / f"{index}.json").write_text("a copy")
            (snapshot / f"{index + 1}.json").symlink_to("nowhere")
        run_in_parallel(*[lambda: link(folder, "a", files)] * 3)  # noqa: B023 (they end in this round)
        for path, blob in files:
            assert str((folder / "snapshots/a" / path).readlink()) == f"../../../blobs/{blob}"
        copies = list(snapshot.glob("*.firstlight-corrupt"))
        assert [path.read_text() for path in copies if not path.is_symlink()] == ["a copy"] * 10
        assert len(list(folder.rglob("*"))) == 3 + 30 + 10, "no temporary file is left"


def test_right_snapshot_link_is_kept_and_a_wrong_one_is_replaced(tmp_path: Path) -> None:
    link(tmp_path, "a", [("x.json", "1" * 40), ("y.json", "2" * 40)])
    right, wrong = (tmp_path / "snapshots/a" / name for name in ("x.json", "y.json"))
    status = right.lstat()
    link(tmp_path, "a", [("x.json", "1" * 40), ("y.json", "3" * 40)])
    assert right.lstat() == status
    assert wrong.readlink().name == "3" * 40
