"""Tests hub caches in unusual states: real files, a shared store, links into lost homes, lost refs, former ids."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import _shared_blobs

from provision.config.models import cache_folder
from provision.core.layout import Root
from provision.core.step import State
from provision.models import inventory, manifest, remove, shared_store
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from provision.models.snapshots import SnapshotStep
from provision.models.verify import Depth
from provision.volume.journal import Journal
from tests.provision import hub_server
from tests.provision.hub_server import REVISION
from tests.provision.model_pulls import FILES, REPO, WEIGHTS, count_gets, run

if TYPE_CHECKING:
    from pathlib import Path

    from provision.models.manifest import Manifest
    from tests.provision.http_server import Server

TOTAL = sum(map(len, FILES.values()))
DIGEST = hashlib.sha256(FILES[WEIGHTS]).hexdigest()
FORMER = "first-owner/model"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Return a root with an empty hub cache."""
    volume_root = Root(tmp_path / "volume")
    volume_root.hub.mkdir(parents=True)
    return volume_root


@pytest.fixture
def hub(serve: Any) -> Server:
    """Start a hub with the files of the model `m`."""
    server: Server = hub_server.start(serve, REPO, FILES)
    return server


@pytest.fixture
def entries(root: Root) -> Manifest:
    """Return a manifest with the model `m`, whose repository has a former id."""
    path = root.path / "models.toml"
    path.write_text(hub_server.manifest_entry("m", REPO, FILES, extra=f'aliases = ["{FORMER}"]\n'))
    return manifest.load(path)


def pull_of(root: Root, entries: Manifest, hub: Server) -> Pull:
    return Pull(root, "m", entries.pick("m"), Hubs(root, {"HF_ENDPOINT": hub.url}))


def repo_of(root: Root) -> Path:
    return root.hub / cache_folder(REPO)


def disk_bytes(folder: Path) -> int:
    """Return the total bytes of the regular files below a folder; hard links of one file count once."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({path.stat().st_ino: path.stat().st_size for path in files}.values())


def make_real(root: Root) -> None:
    """Replace the links of the snapshots by real files, as `cp -rL` does."""
    snapshots = repo_of(root) / "snapshots"
    shutil.copytree(snapshots, snapshots.with_name("copy"))
    shutil.rmtree(snapshots)
    snapshots.with_name("copy").rename(snapshots)


def states(work: Pull) -> set[str]:
    return {state.state for state in work.check_files(Depth.HASH)}


def publish(root: Root, repo: str) -> Path:
    """Move the weights of a repository into the shared store with huggingface_hub's code; return the stored file."""
    xet_hash = "ab" * 32
    is_published = _shared_blobs.publish_blob_to_shared_store(
        blob_path=str(root.hub / cache_folder(repo) / "blobs" / DIGEST),
        xet_hash=xet_hash,
        cache_dir=root.hub,
        expected_size=len(FILES[WEIGHTS]),
    )
    assert is_published
    return _shared_blobs.shared_blob_path(root.hub, xet_hash)


@pytest.mark.parametrize("with_blobs", [True, False])
def test_snapshot_of_real_files_is_used_without_a_download_and_can_be_removed(
    root: Root, entries: Manifest, hub: Server, with_blobs: bool
) -> None:
    work = pull_of(root, entries, hub)
    run(work)
    make_real(root)
    if not with_blobs:
        shutil.rmtree(work.folder / "blobs")
    assert states(work) == {"ok"}
    requests = count_gets(hub, "/resolve/")
    run(work)
    assert count_gets(hub, "/resolve/") == requests, "real files with the right hash are not downloaded"
    before = disk_bytes(work.folder / "snapshots") + disk_bytes(work.folder / "blobs")
    assert before == TOTAL * (2 if with_blobs else 1)
    assert remove.removal(root, entries, "m").bytes == before
    remove.remove(root, entries, "m")
    assert not work.folder.exists()


def test_cache_that_huggingface_hub_filled_without_links_can_be_removed(
    root: Root, entries: Manifest, hub: Server
) -> None:
    code = (
        "from huggingface_hub import snapshot_download; "
        f"snapshot_download({REPO!r}, revision={REVISION!r}, cache_dir={str(root.hub)!r})"
    )
    environment = dict(os.environ) | {"HF_HUB_DISABLE_SYMLINKS": "1", "HF_ENDPOINT": hub.url}
    subprocess.run([sys.executable, "-I", "-c", code], env=environment, check=True)
    assert not any(path.is_symlink() for path in repo_of(root).rglob("*"))
    work = pull_of(root, entries, hub)
    assert states(work) == {"ok"}
    assert remove.removal(root, entries, "m").bytes == TOTAL
    remove.remove(root, entries, "m")
    assert not work.folder.exists()


def test_remove_deletes_a_file_of_the_shared_store_only_if_no_other_repository_links_to_it(
    root: Root, entries: Manifest, hub: Server
) -> None:
    run(pull_of(root, entries, hub))
    other = root.hub / "models--some--other"
    (other / "blobs").mkdir(parents=True)
    payload = publish(root, REPO)
    (other / "blobs" / DIGEST).symlink_to(os.path.relpath(payload, other / "blobs"))
    small = TOTAL - len(FILES[WEIGHTS])
    assert inventory.unlisted(root, entries) == {"some/other": len(FILES[WEIGHTS])}
    assert remove.removal(root, entries, "m").bytes == small
    remove.remove(root, entries, "m")
    assert payload.exists()
    (other / "blobs" / DIGEST).unlink()
    assert sum(inventory.unlisted(root, entries).values()) == len(FILES[WEIGHTS]), (
        "a file of the shared store that no repository uses is listed"
    )
    run(pull_of(root, entries, hub))
    payload.unlink()
    publish(root, REPO)
    assert remove.removal(root, entries, "m").bytes == TOTAL
    remove.remove(root, entries, "m")
    assert not payload.exists()
    assert not payload.with_name(f"{payload.name}.refs").exists()


def test_remove_changes_no_shared_store_without_the_marker_file_of_huggingface_hub(
    root: Root, entries: Manifest, hub: Server
) -> None:
    run(pull_of(root, entries, hub))
    payload = publish(root, REPO)
    (root.hub / "blobs" / _shared_blobs.SHARED_BLOBS_MARKER_NAME).unlink()
    remove.remove(root, entries, "m")
    assert payload.exists()


def test_file_of_the_shared_store_to_which_a_repository_links_is_not_deleted(
    root: Root, entries: Manifest, hub: Server
) -> None:
    run(pull_of(root, entries, hub))
    payload = publish(root, REPO)
    shared_store.drop(payload)
    assert payload.exists()


def test_link_through_a_lost_home_into_the_shared_store_is_repaired(root: Root, entries: Manifest, hub: Server) -> None:
    work = pull_of(root, entries, hub)
    run(work)
    payload = publish(root, REPO)
    blob = work.folder / "blobs" / DIGEST
    blob.unlink()
    blob.symlink_to(f"/gone/home/hub/blobs/{payload.parent.name}/{payload.name}")
    assert states(work) == {"ok", "missing"}
    repair(root, entries)
    assert states(work) == {"ok"}
    assert not blob.readlink().is_absolute()


def repair(root: Root, entries: Manifest | None = None) -> None:
    """Repair the cache; assert that it is drifted before and ok afterwards."""
    step = SnapshotStep(root, entries.with_all_extras() if entries else [], Journal(root.journal))
    assert step.check().state is State.DRIFTED
    step.apply()
    assert step.check().state is State.OK


def test_repair_restores_links_into_a_lost_home_without_the_stored_listing_of_the_hub(
    root: Root, entries: Manifest, hub: Server
) -> None:
    """Leave absolute links into a lost home, no listing and no refs; the repair gets no manifest entry."""
    work = pull_of(root, entries, hub)
    run(work)
    for path in [path for path in work.snapshot.rglob("*") if path.is_symlink()]:
        name = path.readlink().name
        path.unlink()
        path.symlink_to(f"/gone/home/.cache/huggingface/hub/{work.folder.name}/blobs/{name}")
    for lost in ("refs", "trees"):
        shutil.rmtree(work.folder / lost, ignore_errors=True)
    repair(root)
    assert (work.folder / "refs/main").read_text() == REVISION
    snapshot_download(REPO, cache_dir=root.hub, local_files_only=True)
    assert states(work) == {"ok"}


def test_lost_refs_main_beside_another_ref_is_set_to_the_pinned_revision(
    root: Root, entries: Manifest, hub: Server
) -> None:
    work = pull_of(root, entries, hub)
    run(work)
    (work.folder / "refs/main").rename(work.folder / "refs/v1")
    repair(root, entries)
    assert (work.folder / "refs/main").read_text() == REVISION


def test_snapshot_link_whose_blob_is_lost_is_reported(root: Root, entries: Manifest, hub: Server) -> None:
    work = pull_of(root, entries, hub)
    run(work)
    (work.folder / "blobs" / DIGEST).unlink()
    check = SnapshotStep(root, entries.with_all_extras(), Journal(root.journal)).check()
    assert check.state is State.OK
    assert "1 files of models--owner--model are links whose blob is lost" in check.detail


def test_present_file_that_huggingface_hub_has_marked_as_absent_is_found_again(
    root: Root, entries: Manifest, hub: Server
) -> None:
    work = pull_of(root, entries, hub)
    marker = work.folder / ".no_exist" / REVISION / "model_index.json"
    marker.parent.mkdir(parents=True)
    marker.touch()
    run(work)
    assert isinstance(try_to_load_from_cache(REPO, "model_index.json", cache_dir=root.hub), str)
    marker.touch()
    repair(root, entries)
    assert isinstance(try_to_load_from_cache(REPO, "model_index.json", cache_dir=root.hub), str)


def test_remove_of_the_last_model_deletes_blobs_that_no_snapshot_uses(
    root: Root, entries: Manifest, hub: Server
) -> None:
    work = pull_of(root, entries, hub)
    run(work)
    blobs = work.folder / "blobs"
    for name in (f"{'c' * 64}.1234abcd.incomplete", f"{'d' * 64}.incomplete", "e" * 64, f"{'f' * 40}.firstlight-x"):
        (blobs / name).write_bytes(b"x" * 100)
    assert list(inventory.unlisted(root, entries).values()) == [400]
    assert remove.removal(root, entries, "m").bytes == TOTAL + 400
    remove.remove(root, entries, "m")
    assert not work.folder.exists()


def test_remove_keeps_blobs_in_the_listing_of_another_commit(root: Root, entries: Manifest, hub: Server) -> None:
    work = pull_of(root, entries, hub)
    run(work)
    kept = work.folder / "blobs" / ("e" * 64)
    kept.write_bytes(b"x" * 100)
    tree = work.folder / "trees" / f"{'2' * 40}.json"
    tree.write_text(f'{{"format_version": 1, "files": {{"a": {{"blob_id": "{kept.name}", "size": 100}}}}}}')
    remove.remove(root, entries, "m")
    assert [path.name for path in (work.folder / "blobs").iterdir()] == [kept.name]


def test_blob_with_another_hard_link_does_not_count_as_freed_bytes(
    root: Root, entries: Manifest, hub: Server, tmp_path: Path
) -> None:
    work = pull_of(root, entries, hub)
    run(work)
    os.link(work.folder / "blobs" / DIGEST, tmp_path / "other")
    assert remove.removal(root, entries, "m").bytes == TOTAL - len(FILES[WEIGHTS])


def test_model_in_the_cache_folder_of_its_former_id_is_not_downloaded_again(
    root: Root, entries: Manifest, hub: Server
) -> None:
    work = pull_of(root, entries, hub)
    run(work)
    work.folder.joinpath("firstlight-aliases").unlink()
    (root.hub / cache_folder(FORMER)).unlink()
    work.folder.rename(root.hub / cache_folder(FORMER))
    requests = count_gets(hub, "/resolve/")
    plan = work.plan()
    assert plan.bytes_wanted == 0
    run(work)
    assert count_gets(hub, "/resolve/") == requests
    assert states(work) == {"ok"}
    assert disk_bytes(root.hub) < TOTAL + 10_000, "the bytes exist once, although the repository has two folders"


@pytest.mark.parametrize("is_right", [True, False])
def test_real_file_of_another_revision_is_reused_only_if_its_hash_is_right(
    root: Root, entries: Manifest, hub: Server, is_right: bool
) -> None:
    content = FILES[WEIGHTS] if is_right else bytes(len(FILES[WEIGHTS]))
    other = repo_of(root) / "snapshots" / ("2" * 40) / WEIGHTS
    other.parent.mkdir(parents=True)
    other.write_bytes(content)
    work = pull_of(root, entries, hub)
    run(work)
    assert states(work) == {"ok"}
    assert count_gets(hub, WEIGHTS) == (0 if is_right else 1)
    assert other.read_bytes() == content
