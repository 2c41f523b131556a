"""What is in the hub cache, what of it may go, and the writing of hashes into a manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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
    """What a removal takes away: links, blobs that nothing else needs, folders; and the bytes that come free.

    `pins`: the hashes by which its files are pinned: who fetches one of them holds the lock of that name.
    `aliases`: our links to its repository by former ids.
    """

    links: list[Path]
    blobs: list[Path]
    folders: list[Path]
    bytes: int
    pins: frozenset[str] = frozenset()
    aliases: Sequence[Path] = ()

    @property
    def locks(self) -> set[tuple[Path, str]]:
        """(repository, name of the lock) of all that goes."""
        repos = {blob.parent.parent for blob in self.blobs}
        return {(blob.parent.parent, blob_of(blob)) for blob in self.blobs} | {
            (repo, pin) for repo in repos for pin in self.pins
        }


@dataclass(frozen=True)
class CachedModel:
    """One entry of the manifest and what is here of it; `asked` names it with the extras that are here."""

    asked: str
    model: ModelSpec
    states: list[FileState] = field(default_factory=list)

    @property
    def state(self) -> str:
        """One word: whole, partly or absent."""
        if all(each.state == "ok" for each in self.states):
            return "whole"
        return "partly" if _has_weights(self.states) else "absent"

    @property
    def there(self) -> list[FileState]:
        """The files that are here."""
        return [each for each in self.states if each.size is not None]


def held(root: Root, manifest: Manifest) -> list[CachedModel]:
    """Every entry of the manifest, and what is here of it by size alone.

    Entries that share a repository share its small files: an entry is here where weights of its own are.
    """
    found = []
    for name, whole in manifest.models.items():
        snapshot = snapshot_of(root, whole)
        extras = []
        if _has_weights(verify.look(snapshot, whole.files, Depth.SIZE)):
            extras = [
                extra for extra, files in whole.extras.items() if any((snapshot / each.path).exists() for each in files)
            ]
        asked = "+".join([name, *extras])
        model = model_pins.apply(root, manifest.pick(asked))
        found.append(CachedModel(asked, model, verify.look(snapshot, model.files, Depth.SIZE)))
    return found


def _has_weights(states: Sequence[FileState]) -> bool:
    return any(each.size is not None and each.path.endswith(".safetensors") for each in states)


def snapshot_of(root: Root, model: ModelSpec) -> Path:
    """Where a model's pinned revision lies, or would."""
    return root.hub_in_use / model.folder / "snapshots" / model.revision


def others(root: Root, manifest: Manifest) -> dict[str, int]:
    """{repository, or repository@commit: bytes} of what is in the cache beside the manifest's models and the stand-ins.

    A commit is of a repository of ours, at which the manifest pins nothing (any more).
    """
    ours: dict[str, set[str]] = {}
    for model in manifest.models.values():
        ours.setdefault(model.folder, set()).add(model.revision)
    found = {}
    for kind in ("models", "datasets", "spaces"):
        for folder in sorted(root.hub_in_use.glob(f"{kind}--*")):
            name = folder.name.removeprefix(f"{kind}--").replace("--", "/")
            if any(former_ids.leads_to(folder, each) for each in ours):
                continue  # a former id of ours
            if folder.name in ours:
                for snapshot in sorted((folder / "snapshots").glob("*")):
                    if snapshot.name not in ours[folder.name]:
                        gone = removal_of_snapshot(snapshot)
                        found[f"{name}@{snapshot.name[:12]}"] = gone.bytes
            elif not name.startswith(f"{stand_ins.OWNER}/"):
                found[name if kind == "models" else f"{kind}/{name}"] = bytes_in(folder / "blobs")
    return found


def removal_of_snapshot(snapshot: Path) -> Removal:
    """A whole snapshot."""
    return removal_of_links(snapshot, files_below(snapshot), set(), set())


def removal_of_links(snapshot: Path, links: list[Path], pinned: set[str], unnamed: set[str]) -> Removal:
    """Links of one snapshot, whose files are `pinned` so; the blobs, also `unnamed` ones, that no other link names."""
    repo = snapshot.parent.parent
    rest = set(files_below(repo / "snapshots")) - set(links)
    # In one step: a blob may itself lead into a store that repositories share, and what lies there is not ours to take.
    names = {verify.blob_name(link) for link in links} | unnamed
    needed = {verify.blob_name(link) for link in rest}
    every = _entries(repo / "blobs")
    blobs = [path for path in every if blob_of(path) in names - needed]
    folders = []
    if not rest and len(blobs) == len(every) and repo.exists():
        folders = [repo]
    elif links and not any(link.is_relative_to(snapshot) for link in rest):
        folders = [snapshot]  # an empty one would be filled anew from what other snapshots keep
    return Removal(links, blobs, folders, sum(_own_bytes(each) for each in blobs), frozenset(pinned))


def pins_of(file: ModelFile) -> list[str]:
    """Return the hashes that a file is pinned to."""
    return [pin for pin in (file.sha256, file.git_sha1) if pin]


def _entries(blobs: Path) -> list[Path]:
    try:
        return sorted(blobs.iterdir())
    except OSError:
        return []


def blob_of(path: Path) -> str:
    """The blob that a file of `blobs/` is, or is a part of."""
    return path.name.removesuffix(PART).removesuffix(CORRUPT)


def _own_bytes(blob: Path) -> int:
    """What its removal frees: of a link into a shared store nothing."""
    return 0 if blob.is_symlink() else blob.stat().st_size


def cache_of(root: Root, *, is_named: bool) -> Path:
    """The hub cache that is to be filled.

    Raises:
        BlockedError: the root that was named is not set up, or a link on the way to the cache leads nowhere.
    """
    if is_named and not root.marker.is_file():
        raise BlockedError(
            f"{root.path} is not set up, or its volume is not mounted: what is pulled would not be found there. "
            "Mount it, or run setup first."
        )
    cache = root.hub_in_use
    for place in (cache, *cache.parents):
        if place.is_symlink() and not place.exists():
            raise BlockedError(
                f"{place} leads to {place.readlink()}, which is not there: its volume is not mounted. Mount it, or "
                "run repair."
            )
    return cache


def files_below(snapshots: Path) -> list[Path]:
    """Return every file and link below a folder."""
    return [Path(base) / name for base, _, files in os.walk(snapshots) for name in files]


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files right inside a folder; 0 where it cannot be read."""
    try:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return 0
