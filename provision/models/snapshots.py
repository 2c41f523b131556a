"""Links blobs into snapshots, and makes the lost links of snapshots again."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from provision.core.step import Check, State
from provision.fs import durable, records
from provision.fs.atomic import PART, write_atomic
from provision.models import shared_store, tree_listing
from provision.volume.journal_acts import SnapshotRepair

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence

    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.models.tree_listing import Listing
    from provision.volume.journal import Journal

_REPO = re.compile(r"(models|datasets|spaces)--.+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_PRIVILEGE = 1314  # winerror.h, ERROR_PRIVILEGE_NOT_HELD
_MOST_REF_BYTES = 1 << 20
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass
class _Missing:
    """List the faults of a repository that can be corrected from its own files.

    `links`: {commit: [(path in the snapshot, name of the blob)]} of the lost links.
    `main`: the commit to which refs/main is to be set; None if it stays.
    `shared`: (blob, payload) of each blob that is a dangling link into the shared store of another folder.
    `markers`: files of `.no_exist`, huggingface_hub's record of absent files, for files that are present.
    """

    links: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    main: str | None = None
    shared: list[tuple[Path, Path]] = field(default_factory=list)
    markers: list[Path] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Return whether there is no fault."""
        return not (self.links or self.main or self.shared or self.markers)


class SnapshotStep:
    """Makes sure that each present blob is linked in its snapshots, and that refs/main names a present snapshot.

    The paths of the links are in the listing of each commit, which huggingface_hub writes to `trees/`, and in the
    manifest. A missing snapshot is not made again if another snapshot has links to all its blobs, because then the
    user has removed it.
    """

    name = "hub cache"
    essential = False
    local = True

    def __init__(self, root: Root, manifest: Iterable[ModelSpec], journal: Journal) -> None:
        """Store the root, the entries of the manifest with their recorded hashes, and the journal of the run."""
        self.root = root
        self.manifest = list(manifest)
        self.journal = journal

    def describe(self) -> str:
        """Return the text of this step in the plan."""
        return f"rebuild the snapshots and refs of {self.root.hub_in_use} from its blobs"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (the steps of the models hash the blobs)
        """Check for lost links, and for a refs/main that names no present snapshot."""
        repos = self._repos()
        incomplete = {repo.name: missing for repo in repos if (missing := self._missing(repo)) is not None}
        if not incomplete:
            dangling = {repo.name: count for repo in repos if (count := sum(1 for _ in _dangling(repo)))}
            if not dangling:
                return Check(State.OK, f"{len(repos)} repositories, all snapshots complete")
            name, count = next(iter(dangling.items()))
            more = f", and {len(dangling) - 1} more repositories have such links" if len(dangling) > 1 else ""
            lost = f"{count} files of {name} are links whose blob is lost{more}; a pull downloads these files again"
            return Check(State.OK, f"{len(repos)} repositories; {lost}")
        name, missing = next(iter(incomplete.items()))
        count = sum(len(links) for links in missing.links.values())
        lost = f"{count} files of its snapshots" if count else "a valid refs/main" if missing.main else "valid records"
        more = f", and {len(incomplete) - 1} more repositories are incomplete" if len(incomplete) > 1 else ""
        return Check(State.DRIFTED, f"{name} lacks {lost}{more}")

    def apply(self) -> None:
        """Make the lost links, which are relative like those of huggingface_hub, and set refs/main."""
        for repo in self._repos():
            missing = self._missing(repo)
            if missing is None:
                continue
            self.journal.record(SnapshotRepair(repo))
            for blob, payload in missing.shared:
                shared_store.relink(blob, payload)
            for commit, links in missing.links.items():
                link(repo, commit, links)
            if missing.main is not None:
                write_atomic(repo / "refs" / "main", missing.main)
            for marker in missing.markers:
                marker.unlink(missing_ok=True)

    def _repos(self) -> list[Path]:
        """Return the folders of the repositories to check.

        In the volume's hub cache they are all repositories, in another hub cache only those of the manifest.
        """
        hub = self.root.hub_in_use
        folders = {f"models--{model.repo.replace('/', '--')}" for model in self.manifest}
        return [repo for repo in _repos(hub) if hub == self.root.hub or repo.name in folders]

    def _missing(self, repo: Path) -> _Missing | None:
        missing = _Missing(shared=_lost_shared_blobs(repo / "blobs"))
        blobs = _sizes(repo / "blobs") | {blob.name: payload.stat().st_size for blob, payload in missing.shared}
        unlinked = {blob for blob in blobs if _BLOB.fullmatch(blob)} - set(_linked_blobs(repo / "snapshots"))
        listings = self._listings(repo)
        for commit, files in listings.items():
            snapshot = repo / "snapshots" / commit
            if not (_has_files(snapshot) or unlinked & {blob for blob, _ in files.values()}):
                continue
            links = [
                (path, blob)
                for path, (blob, size) in sorted(files.items())
                if blob in blobs and size in {None, blobs[blob]} and _can_be_made(snapshot, path)
            ]
            if links:
                missing.links[commit] = links
        for commit, path, blob in _dangling(repo):  # an absolute link into a deleted home needs no listing
            links = missing.links.get(commit, [])
            if blob in blobs and path not in dict(links) and path not in listings.get(commit, {}):
                missing.links[commit] = [*links, (path, blob)]
        pinned = {model.revision for model in self.manifest if repo.name == model.folder}
        missing.main = _main(repo, listings, missing.links, pinned)
        missing.markers = list(_false_markers(repo, missing.links))
        return None if missing.is_complete else missing

    def _listings(self, repo: Path) -> dict[str, Listing]:
        """Return {commit: its `Listing`}; the commit that refs/main most likely named comes last."""
        listings: dict[str, Listing] = {}
        trees = [path for path in (repo / "trees").glob("*.json") if _COMMIT.fullmatch(path.stem)]
        for tree in sorted(trees, key=lambda path: path.stat().st_mtime_ns):
            listing = tree_listing.read(tree)
            if listing is not None:
                listings[tree.stem] = listing
        for model in self.manifest:
            if repo.name == f"models--{model.repo.replace('/', '--')}":
                listed = listings.pop(model.revision, {})
                sizes = dict(listed.values())
                pinned = {
                    file.path: (blob, sizes.get(blob) if file.size is None else file.size)
                    for file in model.files
                    for blob in (file.sha256, file.git_sha1)
                    if blob is not None and (repo / "blobs" / blob).exists()
                }
                listings[model.revision] = tree_listing.without(listed, pinned) | pinned
        return listings


def link(repo: Path, commit: str, files: Iterable[tuple[str, str]]) -> None:
    """Link blobs into a snapshot, with relative links like those of huggingface_hub.

    Each link is replaced atomically, and several processes may do this at the same time. If the file system cannot
    store links, the blob is moved into the snapshot, as huggingface_hub does it.

    Args:
        repo: the repository's folder in the cache.
        commit: the commit of the snapshot.
        files: (path in the snapshot, name of the blob) of each link.
    """
    _remove_old_links(repo)
    real_files: dict[str, Path] = {}
    for path, blob in files:
        linked = repo / "snapshots" / commit / path
        target = os.path.relpath(repo / "blobs" / blob, linked.parent)
        (repo / ".no_exist" / commit / path).unlink(missing_ok=True)
        if _target(linked) == target:
            continue
        if linked.exists() and not linked.is_symlink():
            _set_aside(repo, linked)
        while _target(linked) != target:
            linked.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary(repo)
            try:
                temporary.symlink_to(target)
            except OSError as error:
                if error.errno not in _NO_LINKS and getattr(error, "winerror", None) != _NO_PRIVILEGE:
                    raise
                _place_file(real_files.get(blob), repo / "blobs" / blob, temporary, linked)
                real_files[blob] = linked
                break
            # Another host may delete the temporary link, since it has no process with this number. Then try again.
            with suppress(FileNotFoundError):
                temporary.replace(linked)
            temporary.unlink(missing_ok=True)


def _place_file(first: Path | None, blob: Path, temporary: Path, path: Path) -> None:
    """Move a blob to a path in a snapshot, or copy `first`, the path to which the blob was moved before."""
    if first is None:
        blob.replace(path)
        return
    shutil.copyfile(first, temporary)
    durable.sync_file(temporary)
    temporary.replace(path)


def _target(path: Path) -> str | None:
    """Return the target of a link; None if the path is not a link."""
    try:
        return str(path.readlink())
    except OSError:
        return None


def _set_aside(repo: Path, path: Path) -> None:
    """Rename a file at the path of a link to NAME.firstlight-corrupt, so that the file is kept.

    If another process has replaced the file by the link meanwhile, the link is deleted; the caller makes it again.
    """
    moved = _temporary(repo)
    with suppress(FileNotFoundError):  # another process has moved the file
        path.replace(moved)
        if moved.is_symlink():
            moved.unlink()
        else:
            moved.replace(path.with_name(f"{path.name}.firstlight-corrupt"))


def _temporary(repo: Path) -> Path:
    """Return a path for a temporary file that no other process uses.

    It is outside of all snapshots, because a temporary file that is left after a kill would count as a model file.
    """
    return repo / f".firstlight-{os.getpid()}-{secrets.token_hex(4)}"


def _remove_old_links(repo: Path) -> None:
    """Delete the temporary links of killed processes; a temporary file that is not a link is kept."""
    import psutil

    for path in repo.glob(".firstlight-*-*"):
        pid = path.name.split("-")[1]
        if path.is_symlink() and not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            path.unlink(missing_ok=True)


def _repos(hub: Path) -> list[Path]:
    try:
        # A link to another folder in the cache is made for a former id; it is not another repository.
        return sorted(
            path
            for path in hub.iterdir()
            if _REPO.fullmatch(path.name) and path.is_dir() and (hub / (_target(path) or "/")).parent != hub
        )
    except OSError:
        return []


def _sizes(blobs: Path) -> dict[str, int]:
    """Return {name: size in bytes} of the blobs; links are followed, since a blob may be a link to a payload."""
    try:
        return {entry.name: entry.stat().st_size for entry in os.scandir(blobs) if entry.is_file()}
    except OSError:
        return {}


def _linked_blobs(snapshots: Path) -> Iterator[str]:
    """Yield the name of the blob to which each link in the snapshots leads; dangling links are left out."""
    for path in _files(snapshots):
        target = _target(path)
        if target is not None and path.exists():
            yield Path(target).name


def _has_files(snapshot: Path) -> bool:
    """Return whether a snapshot has a file; a removed snapshot may have left empty folders."""
    return any(files for _, _, files in os.walk(snapshot))


def _dangling(repo: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (commit, path in the snapshot, name of the blob) of each dangling link in the snapshots."""
    for path in _files(repo / "snapshots"):
        target = _target(path)
        if target is not None and not path.exists():
            commit, *parts = path.relative_to(repo / "snapshots").parts
            if parts:
                yield commit, "/".join(parts), Path(target).name


def _lost_shared_blobs(blobs: Path) -> list[tuple[Path, Path]]:
    """Return (blob, payload) of each blob that is a dangling link into the shared store of another folder."""
    try:
        dangling = [blob for blob in blobs.iterdir() if blob.is_symlink() and not blob.exists()]
    except OSError:
        return []
    return [(blob, payload) for blob in sorted(dangling) if (payload := shared_store.payload_of(blob)) is not None]


def _false_markers(repo: Path, repaired: Mapping[str, Sequence[tuple[str, str]]]) -> Iterator[Path]:
    """Yield the files of `.no_exist` for files that are present or in `repaired`, {commit: [(path, blob)]}.

    With such a record of an absent file, huggingface_hub would not load the present file offline.
    """
    for marker in _files(repo / ".no_exist"):
        commit, *parts = marker.relative_to(repo / ".no_exist").parts
        path = "/".join(parts)
        if (repo / "snapshots" / commit / path).exists() or path in dict(repaired.get(commit, ())):
            yield marker


def _files(folder: Path) -> Iterator[Path]:
    """Yield every file and link below a folder."""
    for base, _, names in os.walk(folder):
        yield from (Path(base) / name for name in names)


def _main(repo: Path, listings: Iterable[str], repaired: Container[str], pinned: Collection[str] = ()) -> str | None:
    """Return the commit to which refs/main is to be set; None if it is right, or if no better commit is known.

    If there are no refs and no listings, it is the commit of the only snapshot. If refs/main is missing and other refs
    exist, it is only set to a commit of `pinned`, because another ref may name the snapshot that the user loads.
    """

    def is_present(commit: str) -> bool:
        return commit in repaired or (repo / "snapshots" / commit).is_dir()

    refs = repo / "refs"
    try:
        text = records.read_bytes(refs / "main", most_bytes=_MOST_REF_BYTES).decode("utf-8", "replace")
    except ValueError:
        text = ""
    except OSError:
        if refs.is_dir() and any(path.is_file() and not PART.search(path.name) for path in refs.rglob("*")):
            present = [commit for commit in listings if commit in pinned and is_present(commit)]
            return present[-1] if present else None
        text = ""
    commit = text.strip()  # an editor may add a line end, which huggingface_hub reads as a part of the commit
    if _COMMIT.fullmatch(commit) and is_present(commit):
        return None if text == commit else commit
    present = [commit for commit in listings if is_present(commit)]
    if not present:
        commits = [path for path in (repo / "snapshots").glob("*") if _COMMIT.fullmatch(path.name) and _has_files(path)]
        present = [path.name for path in commits] if len(commits) == 1 else []
    return present[-1] if present else None


def _can_be_made(snapshot: Path, path: str) -> bool:
    """Return whether a path in a snapshot is free, and no file or link takes the place of a folder above it."""
    folders = [snapshot / folder for folder in PurePosixPath(path).parents]
    is_free = all(folder.is_dir() and not folder.is_symlink() for folder in folders if os.path.lexists(folder))
    return is_free and not (snapshot / path).exists()
