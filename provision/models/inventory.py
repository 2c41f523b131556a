"""Lists the models in the hub cache, and determines the files to delete when a model is removed."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import BlockedError
from provision.models import former_ids, shared_store, stand_ins, tree_listing, verify
from provision.models import pins as model_pins
from provision.models.pull import CORRUPT
from provision.models.pull_plan import PART
from provision.models.verify import Depth

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from provision.config.models import ModelFile, ModelSpec
    from provision.core.layout import Root
    from provision.models.manifest import Manifest
    from provision.models.verify import FileState


# The name of a blob; with a suffix, of a partial file or another version of the blob. The names of huggingface_hub's
# temporary links begin with a dot.
_BLOB_FILE = re.compile(r"\.?([0-9a-f]{64}|[0-9a-f]{40})(\..+)?")


@dataclass(frozen=True)
class Removal:
    """List the paths to delete when a model is removed.

    `links`: the links and real files in snapshots.
    `blobs`: the blobs that nothing else needs.
    `folders`: the snapshot or repository folders to remove when no model file is left in them.
    `bytes`: the disk space that becomes free.
    `pins`: the pinned hashes of the removed files; a pull locks a file under its pinned hash.
    `aliases`: the links by the repository's former ids that firstlight has made.
    `payloads`: the files of huggingface_hub's shared store to which only these blobs are links.
    """

    links: list[Path]
    blobs: list[Path]
    folders: list[Path]
    bytes: int
    pins: frozenset[str] = frozenset()
    aliases: Sequence[Path] = ()
    payloads: Sequence[Path] = ()

    @property
    def locks(self) -> set[tuple[Path, str]]:
        """Return {(folder of the repository, name of the lock)} for all removed blobs and pinned hashes."""
        repos = {blob.parent.parent for blob in self.blobs}
        return {(blob.parent.parent, blob_of(blob)) for blob in self.blobs} | {
            (repo, pin) for repo in repos for pin in self.pins
        }


@dataclass(frozen=True)
class CachedModel:
    """Describe one entry of the manifest and the state of its files in the cache.

    `name`: the entry's name, with "+EXTRA" for each extra that has a file in the cache.
    `model`: the entry with the files of these extras. `states`: the state of each file, in the same order.
    """

    name: str
    model: ModelSpec
    states: list[FileState] = field(default_factory=list)

    @property
    def state(self) -> str:
        """Return "whole" if every file is present, "partly" if some weights are present, else "absent"."""
        if all(file.state == "ok" for file in self.states):
            return "whole"
        return "partly" if _has_weights(self.states) else "absent"

    @property
    def present(self) -> list[FileState]:
        """Return the states of the files that are present, right or wrong."""
        return [file for file in self.states if file.size is not None]


def cached_models(root: Root, manifest: Manifest) -> list[CachedModel]:
    """Return every entry of the manifest with the state of its files, which are checked by size only.

    Entries of the same repository share its small files. So an entry counts as present only if some of its weights
    are present.
    """
    cached = []
    for name, entry in manifest.models.items():
        snapshot = snapshot_of(root, entry)
        extras = []
        if _has_weights(verify.check_files(snapshot, entry.files, Depth.SIZE)):
            extras = [
                extra for extra, files in entry.extras.items() if any((snapshot / file.path).exists() for file in files)
            ]
        full_name = "+".join([name, *extras])
        model = model_pins.apply(root, manifest.pick(full_name))
        cached.append(CachedModel(full_name, model, verify.check_files(snapshot, model.files, Depth.SIZE)))
    return cached


def _has_weights(states: Sequence[FileState]) -> bool:
    return any(state.size is not None and state.path.endswith(".safetensors") for state in states)


def snapshot_of(root: Root, model: ModelSpec) -> Path:
    """Return the path of the snapshot of a model's pinned revision; the folder may be missing."""
    return root.hub_in_use / model.folder / "snapshots" / model.revision


def unlisted(root: Root, manifest: Manifest) -> dict[str, int]:
    """Return {name: bytes} of everything in the cache that is neither a model of the manifest nor a stand-in.

    The name is one of these:
        REPOSITORY, if the manifest has no model of this repository. For a data set or a space, "datasets/" or "spaces/"
        comes before the repository.
        REPOSITORY@COMMIT, for a snapshot of a commit that the manifest does not pin.
        REPOSITORY with a note in parentheses, for the blobs to which no snapshot of the repository has a link.
        "shared blobs …", for the files of the shared store to which no repository has a link.
    """
    pinned: dict[str, set[str]] = {}
    for model in manifest.models.values():
        pinned.setdefault(model.folder, set()).add(model.revision)
    sizes: dict[str, int] = {}
    for kind in ("models", "datasets", "spaces"):
        for folder in sorted(root.hub_in_use.glob(f"{kind}--*")):
            name = folder.name.removeprefix(f"{kind}--").replace("--", "/")
            if any(former_ids.leads_to(folder, pinned_folder) for pinned_folder in pinned):
                continue  # a link by the former id of a model in the manifest
            if folder.name in pinned:
                sizes |= _unpinned(folder, name, pinned[folder.name])
            elif not name.startswith(f"{stand_ins.OWNER}/"):
                sizes[name if kind == "models" else f"{kind}/{name}"] = repository_bytes(folder)
    if unused := sum(shared_store.unreferenced(root.hub_in_use).values()):
        sizes["shared blobs to which no repository has a link (to remove them: hf cache prune)"] = unused
    return sizes


def _unpinned(repo: Path, name: str, pinned: Collection[str]) -> dict[str, int]:
    """Return {name: bytes} of a repository's snapshots that are not pinned, and of its blobs without a link.

    Args:
        repo: the folder of the repository.
        name: the id of the repository.
        pinned: the commits that the manifest pins.
    """
    others = [snapshot for snapshot in sorted((repo / "snapshots").glob("*")) if snapshot.name not in pinned]
    sizes = {f"{name}@{snapshot.name[:12]}": removal_of_snapshot(snapshot).bytes for snapshot in others}
    if unlinked := _unlinked_bytes(repo):
        sizes[f"{name} (blobs in no snapshot, removed with the last snapshot)"] = unlinked
    return sizes


def _unlinked_bytes(repo: Path) -> int:
    """Return the total size in bytes of a repository's blobs and partial files to which no snapshot has a link."""
    linked = {verify.blob_name(path) for path in files_below(repo / "snapshots") if path.is_symlink()}
    return _unique_bytes([path for path in _entries(repo / "blobs") if path.name not in linked])


def removal_of_snapshot(snapshot: Path, kept: Collection[str] = ()) -> Removal:
    """Return the paths to delete when a whole snapshot is removed.

    Args:
        snapshot: the folder of the snapshot.
        kept: the names of blobs that other models need, as for `removal_of_links`.
    """
    return removal_of_links(snapshot, files_below(snapshot), set(), set(), kept)


def removal_of_links(
    snapshot: Path, links: list[Path], pinned: set[str], unnamed: set[str], kept: Collection[str] | None
) -> Removal:
    """Return the paths to delete when files of one snapshot are removed.

    They include the blobs of these files, unless another file in a snapshot of the repository has a link to the blob.

    Args:
        snapshot: the folder of the snapshot.
        links: the links and real files in the snapshot to remove.
        pinned: the pinned hashes of these files.
        unnamed: the names of blobs without a link to remove as well, such as those of partial files.
        kept: the names of blobs that other models need; None if only the blobs of `links` and `unnamed` are removed.
            If a set is given and no other file is left in any snapshot, the remaining blobs are removed too: all of
            them if neither `kept` nor the listing of another commit has one of them, else none.
    """
    repo = snapshot.parent.parent
    other_files = set(files_below(repo / "snapshots")) - set(links)
    # Only the first link is followed, since a blob may itself be a link into the store that repositories share.
    names = {verify.blob_name(link) for link in links if link.is_symlink()} | unnamed
    needed = {verify.blob_name(link) for link in other_files if link.is_symlink()}
    entries = _entries(repo / "blobs")
    if kept is not None and not other_files:
        listed = {tree.stem: tree_listing.listed_blobs(tree) for tree in (repo / "trees").glob("*.json")}
        own = listed.pop(snapshot.name, set())
        others = {blob_of(path) for path in entries} - names - own
        if others.isdisjoint(set(kept).union(*listed.values())):
            names |= others | own.difference(kept)
    blobs = [path for path in entries if blob_of(path) in names - needed and (path.is_symlink() or not path.is_dir())]
    references = shared_store.references(repo.parent) if any(blob.is_symlink() for blob in blobs) else {}
    payloads = [payload for payload, linking in sorted(references.items()) if linking <= set(blobs)]
    folders = []
    if not other_files and len(blobs) == len(entries) and repo.exists():
        folders = [repo]
    elif links and not any(file.is_relative_to(snapshot) for file in other_files):
        folders = [snapshot]  # SnapshotStep would fill an empty snapshot again from blobs of other snapshots
    freed = _freed_bytes([*links, *blobs, *payloads])
    return Removal(links, blobs, folders, freed, frozenset(pinned), payloads=payloads)


def pins_of(file: ModelFile) -> list[str]:
    """Return the pinned hashes of a file: its sha256, its git_sha1, both or none."""
    return [pin for pin in (file.sha256, file.git_sha1) if pin]


def _entries(blobs: Path) -> list[Path]:
    try:
        return sorted(blobs.iterdir())
    except OSError:
        return []


def blob_of(path: Path) -> str:
    """Return the name of the blob to which a file in `blobs/` belongs.

    The file may be the blob, a partial file of firstlight or of huggingface_hub (`.incomplete`), or a wrong blob that
    was renamed (`.firstlight-corrupt`).
    """
    match = _BLOB_FILE.fullmatch(path.name)
    return match[1] if match else path.name.removesuffix(PART).removesuffix(CORRUPT).removesuffix(".incomplete")


def _freed_bytes(paths: Iterable[Path]) -> int:
    """Return the disk space in bytes that becomes free when these paths are deleted.

    A file counts only if all its hard links are among the paths.
    """
    counts: Counter[tuple[int, int]] = Counter()
    freed = 0
    for path in set(paths):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            counts[status.st_dev, status.st_ino] += 1
            freed += status.st_size if counts[status.st_dev, status.st_ino] == status.st_nlink else 0
    return freed


def repository_bytes(repo: Path) -> int:
    """Return the size of a repository in bytes: its blobs, with those in the shared store, and its real files."""
    return _unique_bytes([*_entries(repo / "blobs"), *files_below(repo / "snapshots")])


def _unique_bytes(paths: Iterable[Path]) -> int:
    """Return the total size in bytes of the files at these paths; links are followed, and each file counts once."""
    sizes = {}
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def cache_of(root: Root, *, is_named: bool) -> Path:
    """Return the hub cache into which a pull downloads.

    Args:
        root: the root.
        is_named: the user has named the root, with --root for example; then it must be set up.

    Raises:
        BlockedError: the named root is not set up, or a part of the cache's path is a dangling link.
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


def files_below(folder: Path) -> list[Path]:
    """Return the paths of all files, and of all links to files, below a folder."""
    return [Path(base) / name for base, _, files in os.walk(folder) for name in files]


def bytes_in(folder: Path) -> int:
    """Return the total size in bytes of the files directly in a folder; 0 if the folder cannot be read."""
    try:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return 0
