"""Stand-ins: an architecture with seeded random weights in the hub cache, under a name that cannot be mistaken."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.config.models import cache_folder
from provision.core import layout, process
from provision.core.errors import BlockedError, FirstlightError, from_os_error
from provision.fs.atomic import write_atomic
from provision.fs.file_lock import exclusive_lock
from provision.models import architectures, safetensors, stand_in_files, stand_in_worker
from provision.models.snapshots import link

if TYPE_CHECKING:
    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.models.architectures import Architecture

OWNER = "stand-in"
_FORMAT = 2  # 1: a folder for each component also where the repository is flat, weights in full precision
_HEADROOM = 1.1
_LITTLE = 1 / 3  # of what is free
_STAGING = ".firstlight-stand-in-"
_TIMEOUT_SECONDS = 1800.0
_STEP = 1 << 24  # bytes between two words of progress
_SAID = """\
# {name}: a stand-in

This is NOT {repo}. It has the architecture of {architecture} with seeded random weights, made on this machine
by firstlight so that pipelines, benchmarks and offline work can be tried. Its pictures are noise.
"""

Progress = Callable[[int, int], None]


def repo_of(name: str) -> str:
    """Return the id by which a stand-in is loaded: `from_pretrained("stand-in/NAME")`, or NAME.VARIANT of a variant."""
    return f"{OWNER}/{name.partition('+')[0].replace('@', '.')}"  # an id has no @


def folder_of(root: Root, name: str) -> Path:
    """Its folder in the hub cache."""
    return root.hub_in_use / cache_folder(repo_of(name))


def snapshot_of(root: Root, name: str) -> Path | None:
    """Its snapshot, where it was built."""
    folder = folder_of(root, name)
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / revision
    links = [path for path in sorted(snapshot.rglob("*")) if path.is_symlink()]
    if not all(map(_is_written, links)):
        return None
    named = {path.relative_to(snapshot).as_posix(): path.readlink().name for path in links}
    # Its revision is made of its files: one that lacks some, of a build that went wrong, has another.
    is_whole = named and revision == _revision(named) and all(path.exists() for path in links)
    return snapshot if is_whole else None


def _is_written(path: Path) -> bool:
    """Return whether a file has its size: after a power cut, one may be there and have none of its bytes."""
    try:
        if path.suffix != ".safetensors":
            return path.stat().st_size > 0
        safetensors.read_header(path)
    except (OSError, safetensors.WeightsError):
        return False
    return True


def dtype_of(model: ModelSpec) -> str:
    """The element type of a model's real weights, by its variant: F16 or F32."""
    return "F16" if model.variant == "fp16" else "F32"


def parts_of(model: ModelSpec, architecture: Architecture) -> frozenset[str]:
    """Return the components with weights that an entry has: a safety checker only where its files are among it."""
    folders = {file.path.partition("/")[0] for file in model.files}
    return frozenset(part for part in architecture.classes if part not in architecture.beside or part in folders)


def size_of(model: ModelSpec, architecture: Architecture) -> int:
    """The bytes of a stand-in's weights."""
    return sum(architecture.parameters[part] for part in parts_of(model, architecture)) * stand_in_files.BYTES


def build(
    root: Root,
    name: str,
    model: ModelSpec,
    envs: Path,
    python: Path,
    progress: Progress = lambda *_: None,
    *,
    unasked: bool = False,
) -> Path:
    """Build a stand-in, unless it is there.

    Args:
        root: the volume.
        name: the model's, in the manifest.
        model: its entry.
        envs: the folder with the architectures.
        python: the interpreter of an environment that has diffusers; it is asked where nothing is recorded.
        progress: told (bytes that were written since, bytes in all).
        unasked: nobody asked for it by name: then it is built only where it takes little of the free space.

    Returns:
        Its snapshot.

    Raises:
        SpecError: nothing is known of its architecture.
        BlockedError: it does not fit, or the disk cannot be written.
        FirstlightError: the environment cannot describe it.
    """
    architecture = architectures.load(envs, model.architecture)
    there = snapshot_of(root, name)
    if there is not None:
        return there
    folder = folder_of(root, name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another build of the same is waited for, and is then there.
        with exclusive_lock(root.hub_in_use / ".locks" / folder.name / "build"):
            there = snapshot_of(root, name)
            if there is not None:
                return there
            return _build(root, name, model, architecture, python, progress, unasked=unasked)
    except OSError as error:
        raise from_os_error(error, needed_bytes=size_of(model, architecture)) from error


def describe(architecture: Architecture, python: Path) -> dict[str, Any]:
    """Ask an environment's interpreter what an architecture is made of.

    Raises:
        FirstlightError: it is not there, or it cannot tell.
    """
    if not python.exists():
        raise FirstlightError(f"{python} is not there: a stand-in takes an environment with diffusers.")
    done = process.run(
        [python, "-I", Path(stand_in_worker.__file__)],
        stdin=json.dumps(architecture.request),
        timeout_seconds=_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise FirstlightError(f"the stand-in of {architecture.name} could not be built by {python}: {done.tail(4)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _build(
    root: Root,
    name: str,
    model: ModelSpec,
    architecture: Architecture,
    python: Path,
    progress: Progress,
    *,
    unasked: bool,
) -> Path:
    folder = folder_of(root, name)
    prefix = f"{_STAGING}{repo_of(name).partition('/')[2]}-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)  # of a run that was killed: nobody else builds this one now
    _check_room(folder.parent, name, size_of(model, architecture), unasked=unasked)
    description = architecture.description or describe(architecture, python)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        _write(staging, name, model, architecture, description, progress)
        shutil.rmtree(folder, ignore_errors=True)  # a broken one of an earlier run: it holds nothing but random numbers
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    found = snapshot_of(root, name)
    if found is None:
        raise FirstlightError(f"{folder} was built, and is not whole. Remove it, then run again.")
    return found


def _check_room(cache: Path, name: str, size: int, *, unasked: bool) -> None:
    needed = round(size * _HEADROOM)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise BlockedError(
            f"{cache}: {free:,} bytes are free, {needed:,} are needed for the stand-in of {name}. "
            "Free some, or give another --root, then run again."
        )
    if unasked and needed > free * _LITTLE:
        raise FirstlightError(
            f"its {needed:,} bytes are more than a third of what is free. To build it: {layout.program()} models pull "
            f"--stand-in {name}"
        )


def _write(
    staging: Path,
    name: str,
    model: ModelSpec,
    architecture: Architecture,
    description: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the files, make blobs of them by their hashes, and a snapshot by the hash of them all."""
    files, blobs = staging / "files", staging / "blobs"
    blobs.mkdir()
    files.mkdir()
    text = _SAID.format(name=repo_of(name), repo=model.repo, architecture=model.architecture)
    (files / "README.md").write_text(text, encoding="utf-8")
    total, unsaid = size_of(model, architecture), 0

    def tell(count: int) -> None:
        nonlocal unsaid
        unsaid += count
        if unsaid >= _STEP:
            progress(unsaid, total)
            unsaid = 0

    written = stand_in_files.write(
        files, architecture, description, variant=model.variant, parts=parts_of(model, architecture), progress=tell
    )
    progress(unsaid, total)
    named = {each.path: each.sha256 for each in written}
    for path, blob in named.items():
        (files / path).replace(blobs / blob)
    shutil.rmtree(files)
    revision = _revision(named)
    link(staging, revision, named.items())
    write_atomic(staging / "refs" / "main", revision)


def _revision(named: dict[str, str]) -> str:
    """The hash of what it is made of, {path: blob}, and of how it is made: one of an older form is built anew."""
    return hashlib.sha256(json.dumps([_FORMAT, named], sort_keys=True).encode()).hexdigest()[:40]
