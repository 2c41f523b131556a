"""What is in the hub cache, what of it may go, and the writing of hashes into a manifest."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision import checking, pins, stand_ins
from provision.checking import Depth
from provision.errors import BlockedError, FirstlightError, SpecError
from provision.pulling import CORRUPT, PART, BlobLock
from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from provision.checking import FileState
    from provision.hub import Hub
    from provision.manifest import Manifest
    from provision.paths import Root
    from provision.spec import ModelSpec


@dataclass(frozen=True)
class Removal:
    """What a removal takes away: links, blobs that nothing else needs, folders; and the bytes that come free."""

    links: list[Path]
    blobs: list[Path]
    folders: list[Path]
    bytes: int


@dataclass(frozen=True)
class Held:
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


def held(root: Root, manifest: Manifest) -> list[Held]:
    """Every entry of the manifest, and what is here of it by size alone.

    Entries that share a repository share its small files: an entry is here where weights of its own are.
    """
    found = []
    for name, whole in manifest.models.items():
        snapshot = snapshot_of(root, whole)
        extras = []
        if _has_weights(checking.look(snapshot, whole.files, Depth.SIZE)):
            extras = [
                extra for extra, files in whole.extras.items() if any((snapshot / each.path).exists() for each in files)
            ]
        asked = "+".join([name, *extras])
        model = pins.apply(root, manifest.pick(asked))
        found.append(Held(asked, model, checking.look(snapshot, model.files, Depth.SIZE)))
    return found


def _has_weights(states: Sequence[FileState]) -> bool:
    return any(each.size is not None and each.path.endswith(".safetensors") for each in states)


def snapshot_of(root: Root, model: ModelSpec) -> Path:
    """Where a model's pinned revision lies, or would."""
    return root.hub_in_use / model.folder / "snapshots" / model.revision


def others(root: Root, manifest: Manifest) -> dict[str, int]:
    """{repository: bytes} of what is in the cache beside the manifest's models and the stand-ins."""
    ours = {model.folder for model in manifest.models.values()}
    found = {}
    for kind in ("models", "datasets", "spaces"):
        for folder in sorted(root.hub_in_use.glob(f"{kind}--*")):
            name = folder.name.removeprefix(f"{kind}--").replace("--", "/")
            if folder.name not in ours and not name.startswith(f"{stand_ins.OWNER}/"):
                found[name if kind == "models" else f"{kind}/{name}"] = _bytes_of(folder / "blobs")
    return found


def removal(root: Root, manifest: Manifest, name: str) -> Removal:
    """What goes when a model goes: nothing that another entry that is here, or another snapshot, still needs.

    Args:
        root: the volume.
        manifest: the models by name.
        name: one of them, with or without extras; or stand-in/NAME.

    Raises:
        SpecError: there is no such model.
    """
    if name.startswith(f"{stand_ins.OWNER}/"):
        folder = stand_ins.folder_of(root, name.partition("/")[2])
        blobs = sorted((folder / "blobs").glob("*"))
        return Removal(_links(folder / "snapshots"), blobs, [folder] if blobs else [], _bytes_of(folder / "blobs"))
    model = manifest.pick(name)
    base = name.partition("+")[0]
    repo, snapshot = root.hub_in_use / model.folder, snapshot_of(root, model)
    kept: set[str] = set()
    for each in held(root, manifest):
        alike = (each.model.repo, each.model.revision) == (model.repo, model.revision)
        if alike and each.asked.partition("+")[0] != base and each.state != "absent":
            kept |= {file.path for file in each.model.files}
    whole = manifest.models[base]
    if "+" in name:  # an extra alone goes: the model stays
        kept |= {file.path for file in whole.files}
        going = {file.path for extra in name.split("+")[1:] for file in whole.extras[extra]}
    else:
        going = {file.path for file in (*whole.files, *(each for extra in whole.extras.values() for each in extra))}
    links = [snapshot / path for path in sorted(going - kept) if (snapshot / path).is_symlink()]
    targets = {link.resolve() for link in links if link.exists()}
    needed = {link.resolve() for link in _links(repo / "snapshots") if link not in links}
    blobs = sorted(targets - needed)
    rest = [link for link in _links(repo / "snapshots") if link not in links]
    names = {blob.name for blob in blobs} | {pin for file in whole.files for pin in (file.sha256, file.git_sha1) if pin}
    left = [
        path
        for path in (repo / "blobs").glob("*.firstlight-*")
        if not rest or path.name.removesuffix(PART).removesuffix(CORRUPT) in names
    ]
    blobs += sorted(path for path in left if path not in blobs)
    return Removal(
        links, blobs, [] if rest else [repo] if repo.exists() else [], sum(each.stat().st_size for each in blobs)
    )


def remove(root: Root, gone: Removal) -> None:
    """Take it away, the links first: what a kill leaves is a blob without a name, never a name without its blob.

    Raises:
        BlockedError: somebody fetches one of the files now.
    """
    with ExitStack() as held_locks:
        for blob in gone.blobs:
            name = blob.name.removesuffix(PART).removesuffix(CORRUPT)
            lock = BlobLock(root.hub_in_use / ".locks" / blob.parent.parent.name / f"{name}.lock")
            if not lock.take():
                raise BlockedError(f"{blob} is being fetched by another run. Wait for it, then run again.")
            held_locks.callback(lock.release)
        for link in gone.links:
            link.unlink(missing_ok=True)
        for blob in gone.blobs:
            blob.unlink(missing_ok=True)
        for folder in gone.folders:
            _remove_empty(folder)


def lock(path: Path, name: str, model: ModelSpec, hub: Hub) -> int:
    """Write into a manifest what the official hub says of files that are not pinned there; all else stays as it is.

    Args:
        path: the manifest that has the entry.
        name: the model's.
        model: the entry with its extras' files.
        hub: the official one.

    Returns:
        How many files were completed.

    Raises:
        HubError: it does not answer, or does not have a file.
        FirstlightError: it lists other content than what is pinned already.
    """
    import tomlkit

    listing = hub.listing(model.repo, model.revision)
    document: Any = tomlkit.parse(path.read_text(encoding="utf-8"))
    if name not in document:
        raise SpecError(f"{path} has no entry {name!r}.")
    entry = document[name]
    count = 0
    for row in [*entry["files"], *(row for extra in entry.get("extras", {}).values() for row in extra)]:
        listed = listing.get(str(row["path"]))
        if listed is None:
            raise FirstlightError(f"{hub.endpoint} has no {row['path']} in {model.repo} at {model.revision}.")
        before = dict(row)
        for key, told in (("size", listed.size), (listed.kind, listed.blob)):
            if row.get(key, told) != told:
                raise FirstlightError(
                    f"{hub.endpoint} lists {row['path']} of {model.repo} with {key} {told}, {path} pins {row[key]}. "
                    "Nothing was written: find out which of the two is right."
                )
            row[key] = told
        count += dict(row) != before
    if count:
        write_atomic(path, tomlkit.dumps(document), like=path.stat())
    return count


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


def _links(snapshots: Path) -> list[Path]:
    return [Path(base) / name for base, _, files in os.walk(snapshots) for name in files]


def _bytes_of(folder: Path) -> int:
    try:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return 0


def _remove_empty(folder: Path) -> None:
    """A repository of which every file went: what is left of it is listings, refs and empty folders."""
    if not any(path.is_file() for path in (folder / "snapshots").rglob("*")):
        shutil.rmtree(folder)
