"""Rebuilds a hub cache's refs/ and snapshots/ from its blobs/ and what is known of them, without the network."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from provision.step import Check, State
from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from provision.journal import Journal
    from provision.paths import Root
    from provision.spec import ModelSpec

_REPO = re.compile(r"(models|datasets|spaces)--.+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TREE_FORMAT = 1  # huggingface_hub's TREE_CACHE_FORMAT_VERSION
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass
class _Missing:
    """What one repository lacks: (path in the snapshot, blob) by commit, and the commit that `main` should name."""

    links: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    main: str | None = None


class SnapshotStep:
    """Every blob that a known listing names has its name in a snapshot, and `main` is known where no ref is.

    The client writes a listing of each commit to `trees/`; the manifest pins those of our models.
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
        """Look for blobs without a name, and for repositories without a ref."""
        repos = self._repos()
        lacking = {repo.name: missing for repo in repos if (missing := self._missing(repo)) is not None}
        if not lacking:
            return Check(State.OK, f"{len(repos)} repositories, every snapshot in its place")
        name, missing = next(iter(lacking.items()))
        count = sum(len(links) for links in missing.links.values())
        what = f"{count} files of its snapshots" if count else "refs/main"
        more = f", and {len(lacking) - 1} more repositories lack some" if len(lacking) > 1 else ""
        return Check(State.DRIFTED, f"{name} lacks {what}{more}")

    def apply(self) -> None:
        """Make the links, relative ones as the client makes them, and the refs."""
        for repo in self._repos():
            missing = self._missing(repo)
            if missing is None:
                continue
            self.journal.record("snapshots", path=repo)
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
        named = set(_named_blobs(repo / "snapshots"))
        orphans = {blob for blob in blobs if _BLOB.fullmatch(blob)} - named
        listings = self._listings(repo) if orphans or not _has_ref(repo) else {}
        found = _Missing()
        for commit, files in listings.items():
            if not orphans & {blob for blob, _ in files.values()}:
                continue
            links = [
                (path, blob)
                for path, (blob, size) in sorted(files.items())
                if blobs.get(blob) == size and _is_inside(path) and not (repo / "snapshots" / commit / path).exists()
            ]
            if links:
                found.links[commit] = links
        if not _has_ref(repo):
            there = [commit for commit in listings if commit in found.links or (repo / "snapshots" / commit).is_dir()]
            found.main = there[-1] if there else None
        return found if found.links or found.main else None

    def _listings(self, repo: Path) -> dict[str, dict[str, tuple[str, int]]]:
        """{commit: {path: (blob, size)}}, the commit that is most likely `main` last."""
        found: dict[str, dict[str, tuple[str, int]]] = {}
        trees = [path for path in (repo / "trees").glob("*.json") if _COMMIT.fullmatch(path.stem)]
        for tree in sorted(trees, key=lambda path: path.stat().st_mtime_ns):
            listing = _read_tree(tree)
            if listing is not None:
                found[tree.stem] = listing
        for model in self.manifest:
            if repo.name == f"models--{model.repo.replace('/', '--')}":
                pinned = {
                    file.path: (blob, file.size)
                    for file in model.files
                    for blob in (file.sha256, file.git_sha1)
                    if blob is not None and file.size is not None and (repo / "blobs" / blob).exists()
                }
                found[model.revision] = found.pop(model.revision, {}) | pinned
        return found


def link(repo: Path, commit: str, files: Iterable[tuple[str, str]]) -> None:
    """Give blobs their names in a snapshot, by relative links as the client makes them.

    Args:
        repo: the repository's folder in the cache.
        commit: the snapshot's.
        files: (path in the snapshot, blob).
    """
    for path, blob in files:
        named = repo / "snapshots" / commit / path
        named.parent.mkdir(parents=True, exist_ok=True)
        if named.is_symlink():
            named.unlink()  # it leads nowhere, or to another blob than the verified one
        elif named.exists():
            named.replace(named.with_name(f"{named.name}.firstlight-corrupt"))  # a copy, and not the verified one
        named.symlink_to(os.path.relpath(repo / "blobs" / blob, named.parent))


def _repos(hub: Path) -> list[Path]:
    try:
        return sorted(path for path in hub.iterdir() if _REPO.fullmatch(path.name) and path.is_dir())
    except OSError:
        return []


def _sizes(blobs: Path) -> dict[str, int]:
    """{name: bytes}; a blob may be a link to one that repositories share."""
    try:
        return {entry.name: entry.stat().st_size for entry in os.scandir(blobs) if entry.is_file()}
    except OSError:
        return {}


def _named_blobs(snapshots: Path) -> Iterator[str]:
    for base, _, files in os.walk(snapshots):
        for name in files:
            path = Path(base) / name
            if path.is_symlink():
                yield path.readlink().name


def _has_ref(repo: Path) -> bool:
    refs = repo / "refs"
    return refs.is_dir() and any(path.is_file() for path in refs.rglob("*"))


def _read_tree(path: Path) -> dict[str, tuple[str, int]] | None:
    """A listing as the client keeps it; None where it is of another format, or harmed."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["format_version"] != _TREE_FORMAT:
            return None
        return {
            str(name): (str(info.get("lfs_sha256") or info["blob_id"]), int(info.get("lfs_size") or info["size"]))
            for name, info in kept["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_inside(path: str) -> bool:
    """Whether a name of a listing stays inside the snapshot."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts
