"""Plans a pull: compares a model's present files with the hubs' listings, and lists the files to download."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from provision.core import hashing
from provision.core.errors import BlockedError
from provision.models import local_copies, verify
from provision.models.hub_client import HubError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from provision.config.models import ModelFile, ModelSpec
    from provision.models.hub_client import Hub, ListedFile
    from provision.models.match_listings import FileResolver
    from provision.models.verify import FileState

PART = ".firstlight-part"  # the suffix of a partial file
_HEADROOM = 1.1  # the required free space as a multiple of the bytes to download


@dataclass(frozen=True)
class FileToFetch:
    """Describe one file to download.

    `file`: the file in the entry of the manifest. `listed`: its row in the listing of a hub.
    `have`: the number of its bytes that are in the cache already and need no download.
    """

    file: ModelFile
    listed: ListedFile
    have: int

    @property
    def size(self) -> int | None:
        """Return the size of the file in bytes, as pinned, or as listed if no hash is pinned.

        None if a hash is pinned without a size, because the listed size is not trusted then.
        """
        return self.file.size if self.file.locked else self.listed.size

    @property
    def proof(self) -> dict[str, set[str]]:
        """Return {kind of hash: {hash}}, the hash that the downloaded file must have.

        It is the pinned sha256, else the pinned git_sha1, else the hash in the listing.
        """
        if self.file.sha256 is not None:
            return {"sha256": {self.file.sha256}}
        if self.file.git_sha1 is not None:
            return {"git_sha1": {self.file.git_sha1}}
        return {self.listed.kind: {self.listed.blob}}

    @property
    def content(self) -> str:
        """Return the hash that names the content of the file: the pinned hash, else the hash in the listing.

        Files with the same content are downloaded once. The partial file and its lock have this name. So a later run
        finds the partial file even if another hub lists another hash.
        """
        return content_name(self.file, self.listed)


def content_name(file: ModelFile, listed: ListedFile) -> str:
    """Return the hash that names the content of a file: its pinned hash, else the hash in the listing."""
    return file.sha256 or file.git_sha1 or listed.blob


@dataclass(frozen=True)
class PullPlan:
    """Describe what a pull will do.

    `states`: the state of every file of the model.
    `needed`: the files to download, each from the first of `hubs` that delivers it.
    `hubs`: the hubs, the best first.
    `free`: the free disk space in bytes.
    `unproven`: the number of present files without a pinned hash that the official hub could not confirm.
    `by_mirrors`: {name of a mirror: the number of present files whose hash only this mirror has listed}.
    """

    states: list[FileState]
    needed: list[FileToFetch]
    hubs: list[Hub]
    free: int
    unproven: int = 0
    by_mirrors: Mapping[str, int] = field(default_factory=dict)

    @property
    def fetched(self) -> list[FileToFetch]:
        """Return the files to download, with one file for each content."""
        files: dict[str, FileToFetch] = {}
        for file in self.needed:
            files.setdefault(file.content, file)
        return list(files.values())

    @property
    def bytes_wanted(self) -> int:
        """Return the number of bytes to download, by the sizes in the listings."""
        return sum(file.listed.size - file.have for file in self.fetched)

    @property
    def is_done(self) -> bool:
        """Return whether every file of the model is present with the right content."""
        return all(state.state == "ok" for state in self.states)


def make_plan(hub_cache: Path, resolver: FileResolver, hubs: Sequence[Hub], states: Sequence[FileState]) -> PullPlan:
    """Find the missing files of a model in the listings of the hubs, and return the plan of the pull.

    A present file that has no pinned hash, or one that only a mirror has listed, is compared with the listing of the
    official hub. The hashes in the listings are recorded for files without a pinned hash. If every file is present and
    confirmed, no request is made.

    Args:
        hub_cache: the folder of the hub cache.
        resolver: the object that finds the files of this model in the listings.
        hubs: the hubs to use, the best first.
        states: the state of each file of the model after a check by hash, in the order of `resolver.spec.files`.

    Raises:
        HubError: the available hubs do not list all missing files.
        FirstlightError: a hub lists a file with another size or hash than the pinned one.
        BlockedError: the free disk space is less than 1.1 times the bytes to download.
    """
    spec = resolver.spec
    folder = hub_cache / spec.folder
    pairs = list(zip(spec.files, states, strict=True))
    missing = [file for file, state in pairs if state.state != "ok"]
    unconfirmed = [file for file, state in pairs if state.state == "ok" and resolver.is_unconfirmed(file)]
    free = shutil.disk_usage(_existing_parent(folder)).free
    needed: list[FileToFetch] = []
    ordered: list[Hub] = []
    if missing:
        resolved, ordered = resolver.resolve(missing, hubs)
        corrupt = {state.path for state in states if state.state == "corrupt"}
        needed = [
            FileToFetch(file, listed, 0 if file.path in corrupt else _present_bytes(hub_cache, spec, file, listed))
            for file, listed in resolved
        ]
    by_mirrors: Counter[str] = Counter()
    unproven = 0
    official = [hub for hub in hubs if hub.is_official]
    try:  # only the official hub can prove a present file wrong; if it is unavailable, the file is kept
        confirmed, order = resolver.resolve_once(unconfirmed, official, hubs) if unconfirmed else ([], [])
    except HubError:
        by_mirrors.update(resolver.provisional[file.path] for file in unconfirmed if file.locked)
        unproven = len(unconfirmed) - by_mirrors.total()
    else:
        ordered = ordered or order
        present = {file.path: file for file in unconfirmed}
        # `present` has the hashes with which the files were compared. The resolver's files lack those of a mirror.
        mismatches = {
            file.path: FileToFetch(file, listed, 0)
            for file, listed in confirmed
            if not _matches_listing(folder / "snapshots" / spec.revision, present[file.path], listed)
        }
        needed += mismatches.values()
        states = [_corrupt(state) if state.path in mismatches else state for state in states]
    resolver.apply_pins()
    plan = PullPlan(list(states), needed, ordered, free, unproven, by_mirrors)
    # A size that is not pinned comes from the listing of one hub; if it is wrong, it must not stop the pull.
    trusted_bytes = sum(target.listed.size - target.have for target in plan.fetched if target.size is not None)
    if free < round(trusted_bytes * _HEADROOM):
        raise BlockedError(
            f"{folder}: {free:,} bytes are free, {round(trusted_bytes * _HEADROOM):,} are needed for "
            f"{resolver.name}. Free some space, or use another --root, then run again."
        )
    return plan


def local_candidates(hub_cache: Path, spec: ModelSpec, file: ModelFile, listed: ListedFile) -> Iterator[Path]:
    """Yield the files of the hub cache that may have the content of a missing file; their hashes are not checked.

    Args:
        hub_cache: the folder of the hub cache.
        spec: the entry of the manifest.
        file: the missing file.
        listed: its row in the listing of a hub.
    """
    names = {name for name in (file.sha256, file.git_sha1, listed.blob) if name}
    size = file.size if file.locked else listed.size
    return local_copies.candidates(hub_cache, spec, file.path, names, size)


def _present_bytes(hub_cache: Path, spec: ModelSpec, file: ModelFile, listed: ListedFile) -> int:
    """Return the number of bytes of a missing file that are in the cache already.

    They are in its blob, in its partial file, or in another file that may have the same content.
    """
    for name in (listed.blob, content_name(file, listed) + PART):
        blob = hub_cache / spec.folder / "blobs" / name
        if blob.exists():
            return min(blob.stat().st_size, listed.size)
    return listed.size if next(local_candidates(hub_cache, spec, file, listed), None) is not None else 0


def _matches_listing(snapshot: Path, file: ModelFile, listed: ListedFile) -> bool:
    """Return whether a present file has the hash that a hub lists.

    The content was compared before with the pinned hash, or with the hash that is the name of the blob. So the file is
    hashed here only if that hash is of another kind than the listed hash.
    """
    path = snapshot / file.path
    compared = verify.pins_of(file, path).get(listed.kind)
    return listed.blob in {compared, hashing.hash_file(path, listed.kind) if compared is None else compared}


def _corrupt(state: FileState) -> FileState:
    return replace(state, state="corrupt", reason="does not match the listing of the official hub")


def _existing_parent(path: Path) -> Path:
    """Return the path itself if it exists, else its nearest parent folder that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
