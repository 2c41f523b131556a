"""What is in the hub cache, what of it may go, and the writing of hashes into a manifest."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision import aliases, checking, pins, stand_ins
from provision.checking import Depth
from provision.errors import BlockedError, FirstlightError, SpecError
from provision.locking import BlobLock
from provision.pulling import CORRUPT, PART
from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from provision.checking import FileState
    from provision.hub import Hub
    from provision.manifest import Manifest
    from provision.paths import Root
    from provision.spec import ModelFile, ModelSpec


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
        return {(blob.parent.parent, _blob_of(blob)) for blob in self.blobs} | {
            (repo, pin) for repo in repos for pin in self.pins
        }


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
            if any(aliases.leads_to(folder, each) for each in ours):
                continue  # a former id of ours
            if folder.name in ours:
                for snapshot in sorted((folder / "snapshots").glob("*")):
                    if snapshot.name not in ours[folder.name]:
                        gone = _of_snapshot(snapshot)
                        found[f"{name}@{snapshot.name[:12]}"] = gone.bytes
            elif not name.startswith(f"{stand_ins.OWNER}/"):
                found[name if kind == "models" else f"{kind}/{name}"] = _bytes_of(folder / "blobs")
    return found


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
        return Removal(_links(folder / "snapshots"), blobs, [folder] if blobs else [], _bytes_of(folder / "blobs"))
    try:
        known = manifest.name(name)
    except SpecError:
        if "@" in name and "/" in name:
            return _of_snapshot(_other_snapshot(root, manifest, name))
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
    mine = {pin for file in _every_file(root, manifest, base) if file.path in going - kept for pin in _pins(file)}
    theirs = {
        pin
        for other, entry in manifest.models.items()
        if other != base and entry.repo == model.repo
        for file in _every_file(root, manifest, other)
        for pin in _pins(file)
    }
    gone = _of_links(snapshot, links, mine, mine - theirs)
    is_last = "+" not in name and not others_here
    return replace(gone, aliases=aliases.owned(root.hub_in_use, model.folder)) if is_last else gone


def _of_snapshot(snapshot: Path) -> Removal:
    """A whole snapshot."""
    return _of_links(snapshot, _links(snapshot), set(), set())


def _of_links(snapshot: Path, links: list[Path], pinned: set[str], unnamed: set[str]) -> Removal:
    """Links of one snapshot, whose files are `pinned` so; the blobs, also `unnamed` ones, that no other link names."""
    repo = snapshot.parent.parent
    rest = set(_links(repo / "snapshots")) - set(links)
    # In one step: a blob may itself lead into a store that repositories share, and what lies there is not ours to take.
    names = {checking.blob_name(link) for link in links} | unnamed
    needed = {checking.blob_name(link) for link in rest}
    every = _entries(repo / "blobs")
    blobs = [path for path in every if _blob_of(path) in names - needed]
    folders = []
    if not rest and len(blobs) == len(every) and repo.exists():
        folders = [repo]
    elif links and not any(link.is_relative_to(snapshot) for link in rest):
        folders = [snapshot]  # an empty one would be filled anew from what other snapshots keep
    return Removal(links, blobs, folders, sum(_own_bytes(each) for each in blobs), frozenset(pinned))


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


def _pins(file: ModelFile) -> list[str]:
    return [pin for pin in (file.sha256, file.git_sha1) if pin]


def _entries(blobs: Path) -> list[Path]:
    try:
        return sorted(blobs.iterdir())
    except OSError:
        return []


def _blob_of(path: Path) -> str:
    """The blob that a file of `blobs/` is, or is a part of."""
    return path.name.removesuffix(PART).removesuffix(CORRUPT)


def _own_bytes(blob: Path) -> int:
    """What its removal frees: of a link into a shared store nothing."""
    return 0 if blob.is_symlink() else blob.stat().st_size


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
            if (blob_file.parent.parent, _blob_of(blob_file)) in shown.locks:
                blob_file.unlink(missing_ok=True)
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
    """A snapshot, or a repository, of which every file went: what is left are listings, refs and empty folders."""
    inner = [folder / "snapshots", folder / "blobs"] if (folder / "blobs").is_dir() else [folder]
    if not any(path.is_file() or path.is_symlink() for each in inner for path in each.rglob("*")):
        shutil.rmtree(folder)
