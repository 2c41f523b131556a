"""Names the commit of a repository that a program gets which names none: refs/main."""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.step import Check, State
from provision.fs.atomic import write_atomic
from provision.volume.journal_acts import SnapshotRepair

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Iterator

    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.volume.journal import Journal

_MARK = "firstlight-main"  # beside refs: the revisions that we have named main


def name_main(folder: Path, revision: str, pinned: Collection[str]) -> str | None:
    """Let `main` name a revision: offline, a program that names none takes that.

    What somebody else has named stays, and so does a revision of ours that is pinned still: two entries of the manifest
    would name theirs in turn.

    Args:
        folder: the repository's in a hub cache.
        revision: the commit.
        pinned: every commit of this repository that the manifest pins.

    Returns:
        What its owner should know: `main` names another one that is here too.
    """
    mark = folder / _MARK
    named, ours = main(folder), _text(mark).split()
    if named == revision:
        return None
    is_here = bool(named) and (folder / "snapshots" / named).is_dir()
    if is_here and (named not in ours or named in pinned):
        return (
            f"refs/main names {named[:7]}, which is here too: what names no revision loads that; ours is "
            f"revision={revision[:7]}…"
        )
    # The mark first, with both: killed between the two, we know what is ours whichever it names.
    write_atomic(mark, f"{named} {revision}" if is_here else revision)
    write_atomic(folder / "refs" / "main", revision)
    return None


def main(folder: Path) -> str:
    """Return the commit that `main` of a repository names; empty where it names none."""
    return _text(folder / "refs" / "main")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


_REPO = re.compile(r"(models|datasets|spaces)--.+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TREE_FORMAT = 1  # huggingface_hub's TREE_CACHE_FORMAT_VERSION
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_Listing = dict[str, tuple[str, int | None]]  # {path in the snapshot: (blob, bytes where they are known)}


@dataclass
class _Missing:
    """What one repository lacks: (path in the snapshot, blob) by commit, and the commit that `main` should name."""

    links: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    main: str | None = None


class SnapshotStep:
    """Every blob that a known listing names has its names in a snapshot, and `main` leads to one.

    The client writes a listing of each commit to `trees/`; the manifest pins those of our models. A snapshot that is
    gone, and whose blobs are named by another one, was removed by somebody: it stays away.
    """

    name = "hub cache"
    essential = False
    local = True

    def __init__(self, root: Root, manifest: Iterable[ModelSpec], journal: Journal) -> None:
        """Take the models whose hashes are pinned."""
        self.root = root
        self.manifest = list(manifest)
        self.journal = journal

    def describe(self) -> str:
        """The plan's line."""
        return f"rebuild the snapshots and refs of {self.root.hub_in_use} from its blobs"

    def check(self, *, deep: bool = False) -> Check:  # noqa: ARG002 (blobs are hashed by the models' own steps)
        """Look for names that are gone, and for refs that lead nowhere."""
        repos = self._repos()
        lacking = {repo.name: missing for repo in repos if (missing := self._missing(repo)) is not None}
        if not lacking:
            return Check(State.OK, f"{len(repos)} repositories, every snapshot in its place")
        name, missing = next(iter(lacking.items()))
        count = sum(len(links) for links in missing.links.values())
        what = f"{count} files of its snapshots" if count else "a refs/main that leads to one"
        more = f", and {len(lacking) - 1} more repositories lack some" if len(lacking) > 1 else ""
        return Check(State.DRIFTED, f"{name} lacks {what}{more}")

    def apply(self) -> None:
        """Make the links, relative ones as the client makes them, and the refs."""
        for repo in self._repos():
            missing = self._missing(repo)
            if missing is None:
                continue
            self.journal.record(SnapshotRepair(repo))
            for commit, links in missing.links.items():
                link(repo, commit, links)
            if missing.main is not None:
                write_atomic(repo / "refs" / "main", missing.main)

    def _repos(self) -> list[Path]:
        """The repositories that are looked after: every one on the volume; in the home's own cache, ours alone."""
        hub = self.root.hub_in_use
        ours = {f"models--{model.repo.replace('/', '--')}" for model in self.manifest}
        return [repo for repo in _repos(hub) if hub == self.root.hub or repo.name in ours]

    def _missing(self, repo: Path) -> _Missing | None:
        blobs = _sizes(repo / "blobs")
        nameless = {blob for blob in blobs if _BLOB.fullmatch(blob)} - set(_named_blobs(repo / "snapshots"))
        listings = self._listings(repo)
        found = _Missing()
        for commit, files in listings.items():
            snapshot = repo / "snapshots" / commit
            if not (_holds_names(snapshot) or nameless & {blob for blob, _ in files.values()}):
                continue
            links = [
                (path, blob)
                for path, (blob, size) in sorted(files.items())
                if blob in blobs and size in {None, blobs[blob]} and _is_inside(path) and not (snapshot / path).exists()
            ]
            if links:
                found.links[commit] = links
        found.main = _main(repo, listings, found.links)
        return found if found.links or found.main else None

    def _listings(self, repo: Path) -> dict[str, _Listing]:
        """{commit: its listing}, the commit that is most likely `main` last."""
        found: dict[str, _Listing] = {}
        trees = [path for path in (repo / "trees").glob("*.json") if _COMMIT.fullmatch(path.stem)]
        for tree in sorted(trees, key=lambda path: path.stat().st_mtime_ns):
            listing = _read_tree(tree)
            if listing is not None:
                found[tree.stem] = listing
        for model in self.manifest:
            if repo.name == f"models--{model.repo.replace('/', '--')}":
                listed = found.pop(model.revision, {})
                sizes = dict(listed.values())
                pinned = {
                    file.path: (blob, sizes.get(blob) if file.size is None else file.size)
                    for file in model.files
                    for blob in (file.sha256, file.git_sha1)
                    if blob is not None and (repo / "blobs" / blob).exists()
                }
                found[model.revision] = listed | pinned
        return found


def link(repo: Path, commit: str, files: Iterable[tuple[str, str]]) -> None:
    """Give blobs their names in a snapshot, by relative links as the client makes them.

    A link takes its place at once, and several processes may do this together.

    Args:
        repo: the repository's folder in the cache.
        commit: the snapshot's.
        files: (path in the snapshot, blob).
    """
    _sweep(repo)
    for path, blob in files:
        named = repo / "snapshots" / commit / path
        target = os.path.relpath(repo / "blobs" / blob, named.parent)
        if _target(named) == target:
            continue
        if named.exists() and not named.is_symlink():
            _set_aside(repo, named)
        while _target(named) != target:
            named.parent.mkdir(parents=True, exist_ok=True)
            made = _temporary(repo)
            made.symlink_to(target)
            # Another host, which knows of no process of this number, may sweep it away: then once more.
            with suppress(FileNotFoundError):
                made.replace(named)
            made.unlink(missing_ok=True)


def _target(named: Path) -> str | None:
    """Where a link leads; None where there is none."""
    try:
        return str(named.readlink())
    except OSError:
        return None


def _set_aside(repo: Path, named: Path) -> None:
    """Keep a copy that is not the verified one. What is moved may by now be the right link of another process."""
    moved = _temporary(repo)
    with suppress(FileNotFoundError):  # another process has moved it
        named.replace(moved)
        if moved.is_symlink():
            moved.unlink()
        else:
            moved.replace(named.with_name(f"{named.name}.firstlight-corrupt"))


def _temporary(repo: Path) -> Path:
    """A name of this process alone. It is in no snapshot, where what a kill leaves would count as a file of it."""
    return repo / f".firstlight-{os.getpid()}-{secrets.token_hex(4)}"


def _sweep(repo: Path) -> None:
    """Take away the links that killed processes were about to place; a copy that one was setting aside stays."""
    import psutil

    for left in repo.glob(".firstlight-*-*"):
        pid = left.name.split("-")[1]
        if left.is_symlink() and not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            left.unlink(missing_ok=True)


def _repos(hub: Path) -> list[Path]:
    try:
        # A link to a folder beside it is a former id of that repository, not another one.
        return sorted(
            path
            for path in hub.iterdir()
            if _REPO.fullmatch(path.name) and path.is_dir() and (hub / (_target(path) or "/")).parent != hub
        )
    except OSError:
        return []


def _sizes(blobs: Path) -> dict[str, int]:
    """{name: bytes}; a blob may be a link to one that repositories share."""
    try:
        return {entry.name: entry.stat().st_size for entry in os.scandir(blobs) if entry.is_file()}
    except OSError:
        return {}


def _named_blobs(snapshots: Path) -> Iterator[str]:
    """The blobs that a link leads to, in one step; a link that leads nowhere names none."""
    for base, _, files in os.walk(snapshots):
        for name in files:
            target = _target(Path(base) / name)
            if target is not None and (Path(base) / name).exists():
                yield Path(target).name


def _holds_names(snapshot: Path) -> bool:
    """Whether a snapshot is there: of one that was removed, folders without a file may be left."""
    return any(files for _, _, files in os.walk(snapshot))


def _main(repo: Path, listings: Iterable[str], healed: Container[str]) -> str | None:
    """The commit that `main` shall name; None where it is right, or nothing better is known."""

    def is_there(commit: str) -> bool:
        return commit in healed or (repo / "snapshots" / commit).is_dir()

    refs = repo / "refs"
    try:
        told = (refs / "main").read_text(encoding="utf-8", errors="replace")
    except OSError:
        if refs.is_dir() and any(path.is_file() for path in refs.rglob("*")):
            return None  # what was pulled is known by another ref
        told = ""
    commit = told.strip()  # as an editor leaves it; the client takes every byte
    if _COMMIT.fullmatch(commit) and is_there(commit):
        return None if told == commit else commit
    there = [commit for commit in listings if is_there(commit)]
    return there[-1] if there else None


def _read_tree(path: Path) -> _Listing | None:
    """A listing as the client keeps it; None where it is of another format, or harmed."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["format_version"] != _TREE_FORMAT:
            return None
        return {
            str(name): (str(info.get("lfs_sha256") or info["blob_id"]), int(info.get("lfs_size") or info["size"]))
            for name, info in kept["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_inside(path: str) -> bool:
    """Whether a name of a listing stays inside the snapshot."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts
