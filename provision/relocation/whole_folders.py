"""Recognizes whole folders: folders whose files belong together, such as environments. A merge does not mix them.

The folders of a hub cache, of an Xet store and of the caches of uv and Triton are not whole folders. Their names are
hashes of their content, so the files of two such caches can be mixed.
"""

from __future__ import annotations

import platform
import re
from typing import TYPE_CHECKING

from provision.fs import tree
from provision.fs.kept_metadata import ALL_KEPT
from provision.fs.merge_tree import TreeMerge

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from provision.fs.kept_metadata import KeptMetadata
    from provision.fs.open_dir import OpenDir

CONDA_ENVIRONMENT, VIRTUAL_ENVIRONMENT = "conda environment", "virtual environment"
_BY_ENTRY = {
    "conda-meta": CONDA_ENVIRONMENT,
    "pyvenv.cfg": VIRTUAL_ENVIRONMENT,
    ".git": "git repository",  # two sets of refs and packs do not form one repository
    "hubconf.py": "torch.hub repository",  # its files come from one commit
}
_BARE_REPOSITORY = {"HEAD", "objects", "refs"}


def kind_of(folder: OpenDir) -> str | None:
    """Return the kind of a whole folder, such as "conda environment"; None for any other folder."""
    names = {entry.name for entry in folder.scan()}
    kind = next((kind for name, kind in _BY_ENTRY.items() if name in names), None)
    if kind is not None:
        return kind
    if names >= _BARE_REPOSITORY:
        return "git repository"
    if "info" in names and _holds(folder, "info", "index.json"):
        return "conda package"
    if any(name.endswith(".dist-info") for name in names):
        return "folder of Python packages"
    if "lib" in names and _is_python(folder):
        return "Python installation"
    return None


def merge(
    original: OpenDir,
    target: OpenDir,
    stage: OpenDir,
    progress: Callable[[int, str], None],
    kept: KeptMetadata,
    *,
    is_copied: bool,
) -> TreeMerge:
    """Return a merge of two folders in which whole folders that differ are kept beside each other.

    The original's whole folder gets a new name, which contains the name of this host.

    Args:
        original: the folder that is merged.
        target: the folder that receives the entries.
        stage: the empty folder for the copies.
        progress: called with (count, unit), as in TreeMerge.
        kept: the metadata that both file systems keep.
        is_copied: this run has made the target as a copy of the original; whole folders of the same name in both are
            then the same folder, and are merged.
    """
    host = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node()) or "another-host"
    return TreeMerge(original, target, stage, progress, None if is_copied else kind_of, host, kept)


def conflict(source: OpenDir, target: OpenDir, kept: KeptMetadata = ALL_KEPT) -> str | None:
    """Return the reason why two folders must not be merged, with the next command; None if they may be merged.

    They must not be merged if one of them is a whole folder, and the target does not have all entries of the source.
    `kept` is the metadata that both file systems keep.
    """
    kind = kind_of(source) or kind_of(target)
    if kind is None or tree.is_empty(source) or TreeMerge(source, target, target, kept=kept).is_contained():
        return None
    return (
        f"{source.path} and {target.path} differ, and the files of a {kind} are never merged with others. Give "
        f"{source.path.name} another place on the root: provision relocate {source.path} --to PLACE, or `to` in "
        f"host.toml; or another name in the home: mv {source.path} {source.path}.own"
    )


def note(kind: str, kept: Path, old: Path) -> str:
    """Return a text for the user about a whole folder that a merge has kept at `kept`; its path was `old`."""
    text = f"the {kind} {old} differs from that of the volume, so both are kept: the one of this home is {kept} now"
    if kind == CONDA_ENVIRONMENT:
        return (
            f"{text}. The scripts in {kept}/bin still name {old}, the environment of the volume. Run "
            f"{kept}/bin/python -m NAME instead of a script, or make a copy with right paths: conda create --name NAME "
            f"--clone {kept}"
        )
    if kind == VIRTUAL_ENVIRONMENT:
        return (
            f"{text}. The scripts in {kept}/bin still name {old}, the environment of the volume. Run "
            f"{kept}/bin/python -m NAME instead of a script"
        )
    return text


def _holds(folder: OpenDir, name: str, inner: str) -> bool:
    try:
        with folder.enter(name) as below:
            return below.lstat(inner) is not None
    except OSError:  # the entry is not a folder, or cannot be read
        return False


def _is_python(folder: OpenDir) -> bool:
    """Return whether the folder has Python's standard library, by the file lib/python3.*/os.py."""
    try:
        with folder.enter("lib") as libraries:
            names = [entry.name for entry in libraries.scan() if entry.name.startswith("python3")]
            return any(_holds(libraries, name, "os.py") for name in names)
    except OSError:
        return False
