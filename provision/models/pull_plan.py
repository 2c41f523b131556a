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
    """Describe one file to download, as the hub lists it; `have` bytes of it are present from an earlier run."""

    file: ModelFile
    listed: ListedFile
    have: int

    @property
    def size(self) -> int | None:
        """Return the right number of bytes, or None.

        It is None if a hash is pinned and no size: the size of a listing is not trusted then.
        """
        return self.file.size if self.file.locked else self.listed.size

    @property
    def proof(self) -> dict[str, set[str]]:
        """Return {kind of hash: {right hash}} for the strongest pinned hash.

        The hash of the listing counts only if none is pinned.
        """
        if self.file.sha256 is not None:
            return {"sha256": {self.file.sha256}}
        if self.file.git_sha1 is not None:
            return {"git_sha1": {self.file.git_sha1}}
        return {self.listed.kind: {self.listed.blob}}

    @property
    def content(self) -> str:
        """Return the name of the content, its hash. Files with the same content are downloaded once.

        The partial file and its lock have this name. So a later run finds them, even if the listing names another blob.
        """
        return content_name(self.file, self.listed)


def content_name(file: ModelFile, listed: ListedFile) -> str:
    """Return the name of a file's content: its pinned hash, else the blob in the listing."""
    return file.sha256 or file.git_sha1 or listed.blob


@dataclass(frozen=True)
class PullPlan:
    """Describe what a pull does.

    `states` are of all files. `needed` are the files to download, each from the first of `hubs` that delivers it.
    `free`
    is the free disk space in bytes.
    `unproven`: the number of present files that have no pinned hash and that no hub could confirm.
    `by_mirrors`: {hub: number} of the present files whose hash only this mirror has supplied.
    """

    states: list[FileState]
    needed: list[FileToFetch]
    hubs: list[Hub]
    free: int
    unproven: int = 0
    by_mirrors: Mapping[str, int] = field(default_factory=dict)

    @property
    def fetched(self) -> list[FileToFetch]:
        """Return one file for each content that is needed."""
        files: dict[str, FileToFetch] = {}
        for file in self.needed:
            files.setdefault(file.content, file)
        return list(files.values())

    @property
    def bytes_wanted(self) -> int:
        """Return the number of bytes to download."""
        return sum(file.listed.size - file.have for file in self.fetched)

    @property
    def is_done(self) -> bool:
        """Return whether every file is present and right."""
        return all(state.state == "ok" for state in self.states)


def make_plan(hub_cache: Path, resolver: FileResolver, hubs: Sequence[Hub], states: Sequence[FileState]) -> PullPlan:
    """Return the plan of a pull, and record the hashes of the listings for files without a pinned hash.

    Present files that the official hub has not confirmed are compared with its listing, too. If every file is
    present and confirmed, no request is made.

    Args:
        hub_cache: the folder of the hub cache.
        resolver: finds the files of the model in the listings.
        hubs: the hubs to use, the best first.
        states: the state of each file of the model, in the order of its files, after a check by hash.

    Raises:
        HubError: the hubs that answer do not list all missing files.
        FirstlightError: a hub lists other content than the pinned one.
        BlockedError: the free disk space is not sufficient.
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
    try:  # only the official hub can prove a present file wrong; without its answer the file stays
        confirmed, order = resolver.resolve_once(unconfirmed, official, hubs) if unconfirmed else ([], [])
    except HubError:
        by_mirrors.update(resolver.provisional[file.path] for file in unconfirmed if file.locked)
        unproven = len(unconfirmed) - by_mirrors.total()
    else:
        ordered = ordered or order
        present = {file.path: file for file in unconfirmed}
        # Compared by the pins with which the files were hashed: the resolver returns them without a mirror's pins.
        mismatches = {
            file.path: FileToFetch(file, listed, 0)
            for file, listed in confirmed
            if not _matches_listing(folder / "snapshots" / spec.revision, present[file.path], listed)
        }
        needed += mismatches.values()
        states = [_corrupt(state) if state.path in mismatches else state for state in states]
    resolver.apply_pins()
    plan = PullPlan(list(states), needed, ordered, free, unproven, by_mirrors)
    # A size without a pin comes from one hub's listing, and a wrong one must not stop the pull.
    trusted_bytes = sum(target.listed.size - target.have for target in plan.fetched if target.size is not None)
    if free < round(trusted_bytes * _HEADROOM):
        raise BlockedError(
            f"{folder}: {free:,} bytes are free, {round(trusted_bytes * _HEADROOM):,} are needed for "
            f"{resolver.name}. Free some space, or use another --root, then run again."
        )
    return plan


def local_candidates(hub_cache: Path, spec: ModelSpec, file: ModelFile, listed: ListedFile) -> Iterator[Path]:
    """Yield the files of the hub cache that may have the content of a missing file."""
    names = {name for name in (file.sha256, file.git_sha1, listed.blob) if name}
    size = file.size if file.locked else listed.size
    return local_copies.candidates(hub_cache, spec, file.path, names, size)


def _present_bytes(hub_cache: Path, spec: ModelSpec, file: ModelFile, listed: ListedFile) -> int:
    """Return the number of bytes of a missing file that need no download.

    They are in its blob, in its partial file, or in another file of the cache.
    """
    for name in (listed.blob, content_name(file, listed) + PART):
        blob = hub_cache / spec.folder / "blobs" / name
        if blob.exists():
            return min(blob.stat().st_size, listed.size)
    return listed.size if next(local_candidates(hub_cache, spec, file, listed), None) is not None else 0


def _matches_listing(snapshot: Path, file: ModelFile, listed: ListedFile) -> bool:
    """Return whether a present file has the hash that a hub lists.

    The file's pin, or else the name of its blob, has been compared with the content already. So the content is
    hashed here only if neither gives a hash of the listed kind.
    """
    path = snapshot / file.path
    compared = verify.pins_of(file, path).get(listed.kind)
    return listed.blob in {compared, hashing.hash_file(path, listed.kind) if compared is None else compared}


def _corrupt(state: FileState) -> FileState:
    return replace(state, state="corrupt", reason="does not match the listing of the official hub")


def _existing_parent(path: Path) -> Path:
    """Return the path itself if it exists, else its nearest parent folder that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
