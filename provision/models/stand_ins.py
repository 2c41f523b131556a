"""Builds stand-ins in the hub cache: models of a real architecture with random weights, under an id of their own."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.config.models import cache_folder
from provision.core import layout, process
from provision.core.errors import BlockedError, FirstlightError, from_os_error
from provision.fs.atomic import write_atomic
from provision.fs.file_lock import exclusive_lock
from provision.models import architectures, describe_architecture, safetensors, stand_in_files
from provision.models.snapshots import link

if TYPE_CHECKING:
    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.models.architectures import Architecture

OWNER = "stand-in"
_FORMAT = 2  # format 1 had a folder for each component of a flat repository, and weights in full precision
_HEADROOM = 1.1  # the required free space as a multiple of the weights
_AUTOMATIC_SHARE = 1 / 3  # an automatic build uses at most this part of the free space
_STAGING = ".firstlight-stand-in-"
_TIMEOUT_SECONDS = 1800.0
_REPORT_BYTES = 1 << 24  # bytes between two progress reports
_README = """\
# {name}: a stand-in

This is NOT {repo}. It has the architecture of {architecture} with seeded random weights, made on this machine
by firstlight so that pipelines, benchmarks and offline work can be tried. Its pictures are noise.
"""

Progress = Callable[[int, int], None]


def repo_of(name: str) -> str:
    """Return the id of a stand-in for `from_pretrained`: stand-in/NAME, or stand-in/NAME.VARIANT."""
    return f"{OWNER}/{name.partition('+')[0].replace('@', '.')}"  # @ is not allowed in an id


def folder_of(root: Root, name: str) -> Path:
    """Return the folder of a stand-in in the hub cache."""
    return root.hub_in_use / cache_folder(repo_of(name))


def snapshot_of(root: Root, name: str) -> Path | None:
    """Return the snapshot of a stand-in; None if it is not built or incomplete."""
    folder = folder_of(root, name)
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / revision
    links = [path for path in sorted(snapshot.rglob("*")) if path.is_symlink()]
    if not all(map(_is_written, links)):
        return None
    blobs = {path.relative_to(snapshot).as_posix(): path.readlink().name for path in links}
    # The revision is the hash of all files, so an incomplete stand-in does not match it.
    is_whole = blobs and revision == _revision(blobs) and all(path.exists() for path in links)
    return snapshot if is_whole else None


def _is_written(path: Path) -> bool:
    """Return whether a file has its full size; after a power cut, a file may exist without its content."""
    try:
        if path.suffix != ".safetensors":
            return path.stat().st_size > 0
        safetensors.read_header(path)
    except (OSError, safetensors.WeightsError):
        return False
    return True


def dtype_of(model: ModelSpec) -> str:
    """Return the dtype of a model's real weights, by its variant: F16 or F32."""
    return "F16" if model.variant == "fp16" else "F32"


def parts_of(model: ModelSpec, architecture: Architecture) -> frozenset[str]:
    """Return the components with weights that an entry has; a safety checker only if the entry lists its files."""
    folders = {file.path.partition("/")[0] for file in model.files}
    return frozenset(
        component
        for component in architecture.classes
        if component not in architecture.optional or component in folders
    )


def size_of(model: ModelSpec, architecture: Architecture) -> int:
    """Return the size of a stand-in's weights in bytes."""
    return sum(architecture.parameters[component] for component in parts_of(model, architecture)) * stand_in_files.BYTES


def build(
    root: Root,
    name: str,
    model: ModelSpec,
    envs: Path,
    python: Path,
    progress: Progress = lambda *_: None,
    *,
    is_automatic: bool = False,
) -> Path:
    """Build a stand-in, unless it is present.

    Args:
        root: the root.
        name: the name of the model in the manifest.
        model: its entry.
        envs: the folder with the architectures.
        python: the interpreter of an environment that has diffusers; it is used if no description is recorded.
        progress: called with (bytes written since the last call, bytes in total).
        is_automatic: the user has not requested this stand-in; it is built only if a third of the free space suffices.

    Returns:
        Its snapshot.

    Raises:
        SpecError: the architecture is unknown.
        BlockedError: the free space is not sufficient, or the disk cannot be written.
        FirstlightError: the environment cannot describe the architecture.
    """
    architecture = architectures.load(envs, model.architecture)
    snapshot = snapshot_of(root, name)
    if snapshot is not None:
        return snapshot
    folder = folder_of(root, name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another build of this stand-in may hold the lock; afterwards its result is used.
        with exclusive_lock(root.hub_in_use / ".locks" / folder.name / "build"):
            snapshot = snapshot_of(root, name)
            if snapshot is not None:
                return snapshot
            return _build(root, name, model, architecture, python, progress, is_automatic=is_automatic)
    except OSError as error:
        raise from_os_error(error, needed_bytes=size_of(model, architecture)) from error


def describe(architecture: Architecture, python: Path) -> dict[str, Any]:
    """Let an environment's interpreter describe an architecture.

    Raises:
        FirstlightError: the interpreter is missing, or cannot describe the architecture.
    """
    if not python.exists():
        raise FirstlightError(
            f"{python} does not exist. It is needed to build a stand-in (the model's architecture with random "
            f"weights). Run `{layout.next_command('setup')}` to create an environment with diffusers."
        )
    completed = process.run(
        [python, "-I", Path(describe_architecture.__file__)],
        stdin=json.dumps(architecture.request),
        timeout_seconds=_TIMEOUT_SECONDS,
        check=False,
    )
    if completed.returncode:
        raise FirstlightError(f"{python} could not build the stand-in of {architecture.name}: {completed.tail(4)}")
    description: dict[str, Any] = json.loads(completed.stdout)
    return description


def _build(
    root: Root,
    name: str,
    model: ModelSpec,
    architecture: Architecture,
    python: Path,
    progress: Progress,
    *,
    is_automatic: bool,
) -> Path:
    folder = folder_of(root, name)
    prefix = f"{_STAGING}{repo_of(name).partition('/')[2]}-"
    for leftover in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a killed run; the lock excludes a parallel build
    _check_room(folder.parent, name, size_of(model, architecture), is_automatic=is_automatic)
    description = architecture.description or describe(architecture, python)
    staging = folder.parent / f"{prefix}{secrets.token_hex(4)}"
    staging.mkdir()  # as the umask allows, unlike a folder of tempfile: other users read a shared cache
    try:
        _write(staging, name, model, architecture, description, progress)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete stand-in of an earlier run
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    snapshot = snapshot_of(root, name)
    if snapshot is None:
        raise FirstlightError(f"{folder} is incomplete after its build. Remove it, then run again.")
    return snapshot


def _check_room(cache: Path, name: str, size: int, *, is_automatic: bool) -> None:
    needed = round(size * _HEADROOM)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise BlockedError(
            f"{cache}: {free:,} bytes are free, {needed:,} are needed for the stand-in of {name}. "
            "Free some space, or use another --root, then run again."
        )
    if is_automatic and needed > free * _AUTOMATIC_SHARE:
        raise FirstlightError(
            f"its {needed:,} bytes are more than a third of the free space. To build it: {layout.program()} models "
            f"pull --stand-in {name}"
        )


def _write(
    staging: Path,
    name: str,
    model: ModelSpec,
    architecture: Architecture,
    description: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the files, move them to blobs that are named by their hashes, and link these in a snapshot."""
    files, blobs = staging / "files", staging / "blobs"
    blobs.mkdir()
    files.mkdir()
    text = _README.format(name=repo_of(name), repo=model.repo, architecture=model.architecture)
    (files / "README.md").write_text(text, encoding="utf-8")
    total, unreported = size_of(model, architecture), 0

    def report(count: int) -> None:
        nonlocal unreported
        unreported += count
        if unreported >= _REPORT_BYTES:
            progress(unreported, total)
            unreported = 0

    written = stand_in_files.write(
        files,
        architecture,
        description,
        variant=model.variant,
        components=parts_of(model, architecture),
        progress=report,
    )
    progress(unreported, total)
    hashes = {file.path: file.sha256 for file in written}
    for path, blob in hashes.items():
        (files / path).replace(blobs / blob)
    shutil.rmtree(files)
    revision = _revision(hashes)
    link(staging, revision, hashes.items())
    write_atomic(staging / "refs" / "main", revision)


def _revision(blobs: dict[str, str]) -> str:
    """Return the hash of {path: blob} and of the format.

    A stand-in of an older format has another revision, so that it is built again.
    """
    return hashlib.sha256(json.dumps([_FORMAT, blobs], sort_keys=True).encode()).hexdigest()[:40]
