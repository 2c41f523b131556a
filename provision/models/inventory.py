"""Lists the content of the hub cache, and computes the files that a removal deletes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError
from provision.models import former_ids, stand_ins, verify
from provision.models import pins as model_pins
from provision.models.pull import CORRUPT, PART
from provision.models.verify import Depth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from provision.config.models import ModelFile, ModelSpec
    from provision.core.layout import Root
    from provision.models.manifest import Manifest
    from provision.models.verify import FileState


@dataclass(frozen=True)
class Removal:
    """List the paths that a removal deletes.

    `links` are files of snapshots; `blobs` are needed by nothing else; `folders` are removed once they are empty.
    `bytes` is the disk space that becomes free.
    `pins`: the hashes to which the removed files are pinned. A pull locks a file under its pinned hash.
    `aliases`: the links of firstlight to the repository by its former ids.
    """

    links: list[Path]
    blobs: list[Path]
    folders: list[Path]
    bytes: int
    pins: frozenset[str] = frozenset()
    aliases: Sequence[Path] = ()

    @property
    def locks(self) -> set[tuple[Path, str]]:
        """Return {(repository, name of the lock)} of all removed blobs."""
        repos = {blob.parent.parent for blob in self.blobs}
        return {(blob.parent.parent, blob_of(blob)) for blob in self.blobs} | {
            (repo, pin) for repo in repos for pin in self.pins
        }


@dataclass(frozen=True)
class CachedModel:
    """Describe one entry of the manifest and the state of its files in the cache.

    `name` is the entry's name with the extras that are present.
    """

    name: str
    model: ModelSpec
    states: list[FileState] = field(default_factory=list)

    @property
    def state(self) -> str:
        """Return whole, partly or absent."""
        if all(file.state == "ok" for file in self.states):
            return "whole"
        return "partly" if _has_weights(self.states) else "absent"

    @property
    def present(self) -> list[FileState]:
        """Return the files that are present."""
        return [file for file in self.states if file.size is not None]


def cached_models(root: Root, manifest: Manifest) -> list[CachedModel]:
    """Return every entry of the manifest with the state of its files, compared by size only.

    Entries of one repository share its small files. So an entry counts as present if weights of its own are present.
    """
    cached = []
    for name, entry in manifest.models.items():
        snapshot = snapshot_of(root, entry)
        extras = []
        if _has_weights(verify.look(snapshot, entry.files, Depth.SIZE)):
            extras = [
                extra for extra, files in entry.extras.items() if any((snapshot / file.path).exists() for file in files)
            ]
        full_name = "+".join([name, *extras])
        model = model_pins.apply(root, manifest.pick(full_name))
        cached.append(CachedModel(full_name, model, verify.look(snapshot, model.files, Depth.SIZE)))
    return cached


def _has_weights(states: Sequence[FileState]) -> bool:
    return any(state.size is not None and state.path.endswith(".safetensors") for state in states)


def snapshot_of(root: Root, model: ModelSpec) -> Path:
    """Return the snapshot folder of a model's pinned revision; it may not exist."""
    return root.hub_in_use / model.folder / "snapshots" / model.revision


def unlisted(root: Root, manifest: Manifest) -> dict[str, int]:
    """Return {name: bytes} of everything in the cache that is neither a model of the manifest nor a stand-in.

    The name is the repository, or REPOSITORY@COMMIT for a commit that the manifest does not pin (any more).
    """
    pinned: dict[str, set[str]] = {}
    for model in manifest.models.values():
        pinned.setdefault(model.folder, set()).add(model.revision)
    sizes = {}
    for kind in ("models", "datasets", "spaces"):
        for folder in sorted(root.hub_in_use.glob(f"{kind}--*")):
            name = folder.name.removeprefix(f"{kind}--").replace("--", "/")
            if any(former_ids.leads_to(folder, pinned_folder) for pinned_folder in pinned):
                continue  # a link by a former id
            if folder.name in pinned:
                for snapshot in sorted((folder / "snapshots").glob("*")):
                    if snapshot.name not in pinned[folder.name]:
                        removal = removal_of_snapshot(snapshot)
                        sizes[f"{name}@{snapshot.name[:12]}"] = removal.bytes
            elif not name.startswith(f"{stand_ins.OWNER}/"):
                sizes[name if kind == "models" else f"{kind}/{name}"] = bytes_in(folder / "blobs")
    return sizes


def removal_of_snapshot(snapshot: Path) -> Removal:
    """Return the removal of a whole snapshot."""
    return removal_of_links(snapshot, files_below(snapshot), set(), set())


def removal_of_links(snapshot: Path, links: list[Path], pinned: set[str], unnamed: set[str]) -> Removal:
    """Return the removal of files of one snapshot, with the blobs that no other snapshot file needs.

    Args:
        snapshot: the folder of the snapshot.
        links: the files of it that are removed.
        pinned: the hashes to which these files are pinned.
        unnamed: blobs without a link that are removed as well, such as partial files.
    """
    repo = snapshot.parent.parent
    other_links = set(files_below(repo / "snapshots")) - set(links)
    # Links are followed one step: a blob may be a link into a store that repositories share, which must stay.
    names = {verify.blob_name(link) for link in links} | unnamed
    needed = {verify.blob_name(link) for link in other_links}
    entries = _entries(repo / "blobs")
    blobs = [path for path in entries if blob_of(path) in names - needed]
    folders = []
    if not other_links and len(blobs) == len(entries) and repo.exists():
        folders = [repo]
    elif links and not any(link.is_relative_to(snapshot) for link in other_links):
        folders = [snapshot]  # an empty folder would be filled again from blobs of other snapshots
    return Removal(links, blobs, folders, sum(_own_bytes(blob) for blob in blobs), frozenset(pinned))


def pins_of(file: ModelFile) -> list[str]:
    """Return the hashes to which a file is pinned."""
    return [pin for pin in (file.sha256, file.git_sha1) if pin]


def _entries(blobs: Path) -> list[Path]:
    try:
        return sorted(blobs.iterdir())
    except OSError:
        return []


def blob_of(path: Path) -> str:
    """Return the name of the blob to which a file of `blobs/` belongs; it may be a partial or corrupt file."""
    return path.name.removesuffix(PART).removesuffix(CORRUPT)


def _own_bytes(blob: Path) -> int:
    """Return the bytes that a removal of the blob frees; a link into a shared store frees none."""
    return 0 if blob.is_symlink() else blob.stat().st_size


def cache_of(root: Root, *, is_named: bool) -> Path:
    """Return the hub cache that a pull fills.

    Args:
        root: the root.
        is_named: the user has named the root, so it must be set up.

    Raises:
        BlockedError: the named root is not set up, or the path of the cache has a dangling link.
    """
    if is_named and not root.marker.is_file():
        raise BlockedError(
            f"{root.path} is not set up, or its volume is not mounted. Mount the volume, or run "
            f"`{layout.next_command('setup')}` first."
        )
    cache = root.hub_in_use
    for path in (cache, *cache.parents):
        if path.is_symlink() and not path.exists():
            raise BlockedError(
                f"{path} is a link to {path.readlink()}, which does not exist: its volume is not mounted. Mount it, "
                f"or run `{layout.next_command('repair')}`."
            )
    return cache


def files_below(snapshots: Path) -> list[Path]:
    """Return every file and link below a folder."""
    return [Path(base) / name for base, _, files in os.walk(snapshots) for name in files]


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files directly in a folder; 0 if it cannot be read."""
    try:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return 0
