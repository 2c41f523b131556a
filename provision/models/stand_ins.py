"""Builds stand-ins in the hub cache: models with the architecture of a real model and random weights.

A stand-in has an id of its own, stand-in/NAME.
"""

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
from provision.models.main_ref import read_main
from provision.models.snapshots import link

if TYPE_CHECKING:
    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.models.architectures import Architecture

OWNER = "stand-in"
# The version of the stand-ins' files. Version 1 had a folder for each component of a flat repository, and weights in
# full precision.
_FORMAT = 2
_HEADROOM = 1.1  # the required free space as a multiple of the size of the weights
_AUTOMATIC_SHARE = 1 / 3  # a stand-in that the user has not requested uses at most this part of the free space
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
    """Return the id with which `from_pretrained` loads a stand-in: stand-in/NAME, or stand-in/NAME.VARIANT.

    `name` is the name of a model in the manifest; its extras are ignored.
    """
    return f"{OWNER}/{name.partition('+')[0].replace('@', '.')}"  # an id must not contain @


def folder_of(root: Root, name: str) -> Path:
    """Return the path of a stand-in's folder in the hub cache; it may be missing."""
    return root.hub_in_use / cache_folder(repo_of(name))


def snapshot_of(root: Root, name: str) -> Path | None:
    """Return the folder of a stand-in's snapshot; None if the stand-in is not built or is not complete."""
    folder = folder_of(root, name)
    revision = read_main(folder)
    if not revision:
        return None
    snapshot = folder / "snapshots" / revision
    links = [path for path in sorted(snapshot.rglob("*")) if path.is_symlink()]
    if not all(map(_is_written, links)):
        return None
    blobs = {path.relative_to(snapshot).as_posix(): path.readlink().name for path in links}
    # The revision is computed from the hashes of all files, so the revision of an incomplete stand-in differs.
    is_whole = blobs and revision == _revision(blobs) and all(path.exists() for path in links)
    return snapshot if is_whole else None


def _is_written(path: Path) -> bool:
    """Return whether a file has its content; after a power cut, a file may exist without its content.

    The size of a safetensors file is compared with its header. Another file must not be empty.
    """
    try:
        if path.suffix != ".safetensors":
            return path.stat().st_size > 0
        safetensors.read_header(path)
    except (OSError, safetensors.WeightsError):
        return False
    return True


def dtype_of(model: ModelSpec) -> str:
    """Return the dtype of a model's real weights: "F16" if its variant is fp16, else "F32"."""
    return "F16" if model.variant == "fp16" else "F32"


def parts_of(model: ModelSpec, architecture: Architecture) -> frozenset[str]:
    """Return the names of the components with weights that an entry of the manifest has.

    An optional component, such as a safety checker, is one of them only if the entry lists files of that component.
    """
    folders = {file.path.partition("/")[0] for file in model.files}
    return frozenset(
        component
        for component in architecture.classes
        if component not in architecture.optional or component in folders
    )


def size_of(model: ModelSpec, architecture: Architecture) -> int:
    """Return the size of the weights of a model's stand-in in bytes."""
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
    """Build the stand-in of a model, unless it is present.

    Args:
        root: the root.
        name: the name of the model in the manifest.
        model: the entry of the manifest.
        envs: the folder `envs`, which has the architectures.
        python: the interpreter of an environment with diffusers; it is used only if no description is recorded.
        progress: called with (bytes written since the last call, bytes in total).
        is_automatic: the user has not requested this stand-in; it is built only if it needs at most a third of the
            free space.

    Returns:
        The folder of the stand-in's snapshot.

    Raises:
        SpecError: the architecture is unknown.
        BlockedError: the free space is not sufficient, or the disk cannot be written.
        FirstlightError: describe_architecture.py fails, or an automatic build needs more than a third of the space.
    """
    architecture = architectures.load(envs, model.architecture)
    snapshot = snapshot_of(root, name)
    if snapshot is not None:
        return snapshot
    folder = folder_of(root, name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another process may hold the lock while it builds this stand-in; its result is used then.
        with exclusive_lock(root.hub_in_use / ".locks" / folder.name / "build"):
            snapshot = snapshot_of(root, name)
            if snapshot is not None:
                return snapshot
            return _build(root, name, model, architecture, python, progress, is_automatic=is_automatic)
    except OSError as error:
        raise from_os_error(error, needed_bytes=size_of(model, architecture)) from error


def describe(architecture: Architecture, python: Path) -> dict[str, Any]:
    """Return the output of describe_architecture.py for an architecture.

    Args:
        architecture: the architecture to describe.
        python: the interpreter of an environment with diffusers, under which the script runs.

    Raises:
        FirstlightError: the interpreter does not exist, or the script fails.
    """
    if not python.exists():
        raise FirstlightError(
            f"{python} does not exist. This interpreter is needed to build a stand-in (the model's architecture with "
            f"random weights). Run `{layout.next_command('setup')}` to create an environment with diffusers."
        )
    completed = process.run(
        [python, "-I", Path(describe_architecture.__file__)],
        stdin=json.dumps(architecture.request),
        timeout_seconds=_TIMEOUT_SECONDS,
        check=False,
    )
    if completed.returncode:
        raise FirstlightError(f"{python} could not describe the architecture {architecture.name}: {completed.tail(4)}")
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
        shutil.rmtree(leftover, ignore_errors=True)  # left by a killed run: the lock excludes a parallel build
    _check_room(folder.parent, name, size_of(model, architecture), is_automatic=is_automatic)
    description = architecture.description or describe(architecture, python)
    staging = folder.parent / f"{prefix}{secrets.token_hex(4)}"
    staging.mkdir()  # with the mode of the umask, unlike tempfile: other users read a shared cache
    try:
        _write(staging, name, model, architecture, description, progress)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete stand-in of an earlier run
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    snapshot = snapshot_of(root, name)
    if snapshot is None:
        raise FirstlightError(
            f"{folder} is not complete after the stand-in was built. Remove this folder, then run the same command "
            "again."
        )
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
            f"the stand-in needs {needed:,} bytes, more than a third of the free space. To build it: "
            f"{layout.program()} models pull --stand-in {name}"
        )


def _write(
    staging: Path,
    name: str,
    model: ModelSpec,
    architecture: Architecture,
    description: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the files of a stand-in, move each file to a blob that is named by its hash, and link the blobs."""
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
    """Return the revision of a stand-in: 40 hex digits, the hash of `_FORMAT` and {path: name of its blob}.

    A stand-in of an older format has another revision, so that it is built again.
    """
    return hashlib.sha256(json.dumps([_FORMAT, blobs], sort_keys=True).encode()).hexdigest()[:40]
