"""Removes a model from the hub cache, except for the files that another entry of the manifest needs."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, SpecError
from provision.models import former_ids, pins, shared_store, stand_ins
from provision.models.blob_lock import BlobLock
from provision.models.inventory import (
    Removal,
    blob_of,
    bytes_in,
    cached_models,
    files_below,
    pins_of,
    removal_of_links,
    removal_of_snapshot,
    snapshot_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.models import ModelFile
    from provision.core.layout import Root
    from provision.models.manifest import Manifest


def removal(root: Root, manifest: Manifest, name: str) -> Removal:
    """Return the paths to delete when a model is removed.

    Files that another present entry or another snapshot needs are not among them.

    Args:
        root: the root.
        manifest: the manifest.
        name: the name of a model as for `Manifest.name`, or stand-in/NAME, or REPOSITORY@COMMIT as in the result of
            `inventory.unlisted`.

    Raises:
        SpecError: there is no such model, or it cannot be removed alone.
    """
    if name.startswith(f"{stand_ins.OWNER}/"):
        folder = stand_ins.folder_of(root, name.partition("/")[2])
        blobs = sorted((folder / "blobs").glob("*"))
        return Removal(files_below(folder / "snapshots"), blobs, [folder] if blobs else [], bytes_in(folder / "blobs"))
    try:
        canonical = manifest.name(name)
    except SpecError:
        if "@" in name and "/" in name:
            snapshot = _unpinned_snapshot(root, manifest, name)
            return removal_of_snapshot(snapshot, _pins_in(root, manifest, snapshot.parent.parent))
        raise
    if "+" in name and "+" not in canonical:
        raise SpecError(
            f"{name} has no files of its own: they are part of {canonical}. Remove {canonical} instead: "
            f"provision models remove {canonical}"
        )
    name = canonical
    model = manifest.pick(name)
    base = name.partition("+")[0]
    snapshot = snapshot_of(root, model)
    other_models = [
        cached.model
        for cached in cached_models(root, manifest)
        if cached.model.repo == model.repo and cached.name.partition("+")[0] != base and cached.state != "absent"
    ]
    kept = {file.path for other in other_models if other.revision == model.revision for file in other.files}
    full_entry = manifest.models[base]
    if "+" in name:  # only the extra is removed
        kept |= {file.path for file in full_entry.files}
        removed = {file.path for extra in name.split("+")[1:] for file in full_entry.extras[extra]}
    else:
        removed = {file.path for file in _all_files(root, manifest, base)}
    # A merge or a repair may have kept other versions of a file in the same folder.
    links = [
        file
        for path in sorted(removed - kept)
        for file in (snapshot / path, *_kept_versions(snapshot / path))
        if file.is_symlink() or file.is_file()
    ]
    # A partial file of an unfinished pull has no link yet. It is removed unless another entry pins the same hash.
    own_pins = {
        pin for file in _all_files(root, manifest, base) if file.path in removed - kept for pin in pins_of(file)
    }
    other_pins = {
        pin
        for other, entry in manifest.models.items()
        if other != base and entry.repo == model.repo
        for file in _all_files(root, manifest, other)
        for pin in pins_of(file)
    }
    whole = None if "+" in name else other_pins
    plan = removal_of_links(snapshot, links, own_pins, own_pins - other_pins, whole)
    is_last = "+" not in name and not other_models
    return replace(plan, aliases=former_ids.owned(root.hub_in_use, model.folder)) if is_last else plan


def _kept_versions(file: Path) -> list[Path]:
    """Return the other versions of a snapshot's file that firstlight has kept in the same folder."""
    try:
        return [path for path in file.parent.iterdir() if path.name.startswith(f"{file.name}.firstlight-")]
    except OSError:
        return []


def _pins_in(root: Root, manifest: Manifest, repo: Path) -> set[str]:
    """Return the pinned hashes in all entries of the manifest for a repository; `repo` is its folder in the cache."""
    names = [name for name, model in manifest.models.items() if model.folder == repo.name]
    return {pin for name in names for file in _all_files(root, manifest, name) for pin in pins_of(file)}


def _unpinned_snapshot(root: Root, manifest: Manifest, name: str) -> Path:
    """Return the snapshot for REPOSITORY@COMMIT, where COMMIT may be the beginning of a commit.

    Raises:
        SpecError: not exactly one snapshot matches, or the manifest pins the commit.
    """
    repo, _, commit = name.partition("@")
    folder = root.hub_in_use / f"models--{repo.replace('/', '--')}" / "snapshots"
    matches = [path for path in sorted(folder.glob("*")) if commit and path.name.startswith(commit)]
    if len(matches) != 1:
        raise SpecError(f"{name} matches {len(matches)} snapshots in the cache. Run: provision models list")
    entries = [entry for entry, model in manifest.models.items() if snapshot_of(root, model) == matches[0]]
    if entries:
        raise SpecError(f"{name} is the pinned revision of {entries[0]}. Run: provision models remove {entries[0]}")
    return matches[0]


def _all_files(root: Root, manifest: Manifest, name: str) -> list[ModelFile]:
    """Return the files of an entry and of all its extras, with the recorded hashes added."""
    return pins.apply(root, manifest.pick("+".join([name, *manifest.models[name].extras]))).files


def remove(root: Root, manifest: Manifest, name: str) -> None:
    """Delete the paths that `removal` returns for a model.

    The paths are determined a second time after the blobs are locked, since another run may need some of them by now.
    Links are deleted before blobs. So a kill may leave a blob without a link, but never a link without its blob.

    Args:
        root: the root.
        manifest: the manifest.
        name: the name of the model, as for `removal`.

    Raises:
        BlockedError: another run downloads one of the files.
        SpecError: as for `removal`.
    """
    expected = removal(root, manifest, name)
    with ExitStack() as locks:
        for repo, blob in sorted(expected.locks):
            lock = BlobLock(root.hub_in_use / ".locks" / repo.name / f"{blob}.lock")
            if not lock.take_or_decide():
                raise BlockedError(
                    f"{repo / 'blobs' / blob} is being downloaded by another run. Wait until that run has ended, then "
                    "run the same command again."
                )
            locks.callback(lock.release)
        plan = removal(root, manifest, name)  # under the locks, no other run can link a blob
        for link in [*plan.aliases, *plan.links]:
            link.unlink(missing_ok=True)
        for blob_file in plan.blobs:
            if (blob_file.parent.parent, blob_of(blob_file)) in expected.locks:
                blob_file.unlink(missing_ok=True)
        for payload in plan.payloads:
            shared_store.drop(payload)
        for folder in plan.folders:
            _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a snapshot or repository if it contains no model file any more.

    refs/, the listings of huggingface_hub (`trees/`) and empty folders are not model files. The listing of a removed
    snapshot and its record of absent files (`.no_exist`) are removed too.
    """
    is_snapshot = folder.parent.name == "snapshots"
    content_folders = [folder] if is_snapshot else [folder / "snapshots", folder / "blobs"]
    if not any(
        path.is_file() or path.is_symlink() for content_folder in content_folders for path in content_folder.rglob("*")
    ):
        shutil.rmtree(folder)
        if is_snapshot:
            repo = folder.parent.parent
            shutil.rmtree(repo / ".no_exist" / folder.name, ignore_errors=True)
            (repo / "trees" / f"{folder.name}.json").unlink(missing_ok=True)
