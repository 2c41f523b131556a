"""Removes a model from the hub cache, and nothing that another entry needs."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError, SpecError
from provision.models import former_ids, pins, stand_ins
from provision.models.blob_lock import BlobLock
from provision.models.inventory import (
    Removal,
    blob_of,
    bytes_in,
    files_below,
    held,
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
    """What goes when a model goes: nothing that another entry that is here, or another snapshot, still needs.

    Args:
        root: the volume.
        manifest: the models by name.
        name: one of them, as `Manifest.name` takes it; or stand-in/NAME; or repository@commit of `others`.

    Raises:
        SpecError: there is no such model.
    """
    if name.startswith(f"{stand_ins.OWNER}/"):
        folder = stand_ins.folder_of(root, name.partition("/")[2])
        blobs = sorted((folder / "blobs").glob("*"))
        return Removal(files_below(folder / "snapshots"), blobs, [folder] if blobs else [], bytes_in(folder / "blobs"))
    try:
        known = manifest.name(name)
    except SpecError:
        if "@" in name and "/" in name:
            return removal_of_snapshot(_other_snapshot(root, manifest, name))
        raise
    if "+" in name and "+" not in known:
        raise SpecError(f"{name}: these files are part of {known}, and go with it alone. Name that, or keep them.")
    name = known
    model = manifest.pick(name)
    base = name.partition("+")[0]
    snapshot = snapshot_of(root, model)
    others_here = [
        each.model
        for each in held(root, manifest)
        if each.model.repo == model.repo and each.asked.partition("+")[0] != base and each.state != "absent"
    ]
    kept = {file.path for other in others_here if other.revision == model.revision for file in other.files}
    whole = manifest.models[base]
    if "+" in name:  # an extra alone goes: the model stays
        kept |= {file.path for file in whole.files}
        going = {file.path for extra in name.split("+")[1:] for file in whole.extras[extra]}
    else:
        going = {file.path for file in _every_file(root, manifest, base)}
    links = [snapshot / path for path in sorted(going - kept) if (snapshot / path).is_symlink()]
    # What an unfinished pull has left has no name yet: it goes where no other entry may want it.
    mine = {pin for file in _every_file(root, manifest, base) if file.path in going - kept for pin in pins_of(file)}
    theirs = {
        pin
        for other, entry in manifest.models.items()
        if other != base and entry.repo == model.repo
        for file in _every_file(root, manifest, other)
        for pin in pins_of(file)
    }
    gone = removal_of_links(snapshot, links, mine, mine - theirs)
    is_last = "+" not in name and not others_here
    return replace(gone, aliases=former_ids.owned(root.hub_in_use, model.folder)) if is_last else gone


def _other_snapshot(root: Root, manifest: Manifest, name: str) -> Path:
    repo, _, commit = name.partition("@")
    folder = root.hub_in_use / f"models--{repo.replace('/', '--')}" / "snapshots"
    found = [path for path in sorted(folder.glob("*")) if commit and path.name.startswith(commit)]
    if len(found) != 1:
        raise SpecError(f"{name}: {len(found)} snapshots of that name are here. Look: provision models list")
    pinned = [each for each, model in manifest.models.items() if snapshot_of(root, model) == found[0]]
    if pinned:
        raise SpecError(f"{name} is what {pinned[0]} is pinned to: name that.")
    return found[0]


def _every_file(root: Root, manifest: Manifest, name: str) -> list[ModelFile]:
    """The files of an entry and of all its extras, with what is on record of their hashes."""
    return pins.apply(root, manifest.pick("+".join([name, *manifest.models[name].extras]))).files


def remove(root: Root, manifest: Manifest, name: str) -> None:
    """Take away what `removal` names, as it is now: another run may have come to need some of it since it was shown.

    The links go first: what a kill leaves is a blob without a name, never a name without its blob.

    Raises:
        BlockedError: somebody fetches one of the files now.
        SpecError: there is no such model.
    """
    shown = removal(root, manifest, name)
    with ExitStack() as held_locks:
        for repo, blob in sorted(shown.locks):
            lock = BlobLock(root.hub_in_use / ".locks" / repo.name / f"{blob}.lock")
            if not lock.take():
                raise BlockedError(
                    f"{repo / 'blobs' / blob} is being fetched by another run. Wait for it, then run again."
                )
            held_locks.callback(lock.release)
        gone = removal(root, manifest, name)  # under its locks, nobody gives a blob another name
        for link in [*gone.aliases, *gone.links]:
            link.unlink(missing_ok=True)
        for blob_file in gone.blobs:
            if (blob_file.parent.parent, blob_of(blob_file)) in shown.locks:
                blob_file.unlink(missing_ok=True)
        for folder in gone.folders:
            _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """A snapshot, or a repository, of which every file went: what is left are listings, refs and empty folders."""
    inner = [folder / "snapshots", folder / "blobs"] if (folder / "blobs").is_dir() else [folder]
    if not any(path.is_file() or path.is_symlink() for each in inner for path in each.rglob("*")):
        shutil.rmtree(folder)
