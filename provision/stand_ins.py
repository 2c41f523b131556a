"""Stand-ins: an architecture with seeded random weights in the hub cache, under a name that cannot be mistaken."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from provision import architectures, command, digests, paths, stand_in_worker
from provision.errors import BlockedError, FirstlightError
from provision.locking import alone
from provision.snapshots import link
from provision.volume import write_atomic

if TYPE_CHECKING:
    from provision.architectures import Architecture
    from provision.paths import Root
    from provision.spec import ModelSpec

OWNER = "stand-in"
_SEED = 0
_HEADROOM = 1.1
_LITTLE = 0.1
_BYTES = {"F16": 2, "F32": 4}
_STAGING = ".firstlight-stand-in-"
_TIMEOUT_SECONDS = 1800.0
_SAID = """\
# {name}: a stand-in

This is NOT {repo}. It has the architecture of {architecture} with seeded random weights, made on this machine
by firstlight so that pipelines, benchmarks and offline work can be tried. Its pictures are noise.
"""


def repo_of(name: str) -> str:
    """By which name a stand-in is loaded: `from_pretrained("stand-in/NAME")`."""
    return f"{OWNER}/{name.partition('+')[0]}"


def folder_of(root: Root, name: str) -> Path:
    """Its folder in the hub cache."""
    return root.hub_in_use / f"models--{repo_of(name).replace('/', '--')}"


def snapshot_of(root: Root, name: str) -> Path | None:
    """Its snapshot, where it was built."""
    folder = folder_of(root, name)
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / revision
    links = [path for path in sorted(snapshot.rglob("*")) if path.is_symlink()]
    named = {path.relative_to(snapshot).as_posix(): path.readlink().name for path in links}
    # Its revision is made of its files: one that lacks some, of a build that went wrong, has another.
    is_whole = named and revision == _revision(named) and all(path.exists() for path in links)
    return snapshot if is_whole else None


def dtype_of(model: ModelSpec) -> str:
    """The element type of a model's weights, by its variant: F16 or F32."""
    return "F16" if model.variant == "fp16" else "F32"


def size_of(model: ModelSpec, architecture: Architecture) -> int:
    """The bytes of its weights."""
    return sum(architecture.parameters.values()) * _BYTES[dtype_of(model)]


def build(root: Root, name: str, model: ModelSpec, envs: Path, python: Path, *, unasked: bool = False) -> Path:
    """Build a stand-in, unless it is there.

    Args:
        root: the volume.
        name: the model's, in the manifest.
        model: its entry.
        envs: the folder with the architectures.
        python: the interpreter of an environment that has diffusers.
        unasked: nobody asked for it by name: then it is built only where it takes little of the free space.

    Returns:
        Its snapshot.

    Raises:
        SpecError: nothing is known of its architecture.
        BlockedError: it does not fit.
        FirstlightError: the environment cannot build it.
    """
    architecture = architectures.load(envs, model.architecture)
    there = snapshot_of(root, name)
    if there is not None:
        return there
    folder = folder_of(root, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(
        root.hub_in_use / ".locks" / folder.name / "build"
    ):  # another build of the same is waited for, and is then there
        there = snapshot_of(root, name)
        if there is not None:
            return there
        return _build(root, name, model, architecture, python, unasked=unasked)


def _build(root: Root, name: str, model: ModelSpec, architecture: Architecture, python: Path, *, unasked: bool) -> Path:
    folder = folder_of(root, name)
    prefix = f"{_STAGING}{name.partition('+')[0]}-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)  # of a run that was killed: nobody else builds this one now
    needed = round(size_of(model, architecture) * _HEADROOM)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise BlockedError(
            f"{folder.parent}: {free:,} bytes are free, {needed:,} are needed for the stand-in of {name}. "
            "Free some, or give another --root, then run again."
        )
    if unasked and needed > free * _LITTLE:
        raise FirstlightError(
            f"its {needed:,} bytes are more than a tenth of what is free. To build it: {paths.program()} models pull "
            f"--stand-in {name}"
        )
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        _write(staging / "files", name, model, architecture, python)
        _place(staging)
        shutil.rmtree(folder, ignore_errors=True)  # a broken one of an earlier run: it holds nothing but random numbers
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    found = snapshot_of(root, name)
    if found is None:
        raise FirstlightError(f"{folder} was built, and is not whole. Remove it, then run again.")
    return found


def _write(folder: Path, name: str, model: ModelSpec, architecture: Architecture, python: Path) -> None:
    if not python.exists():
        raise FirstlightError(f"{python} is not there: a stand-in takes an environment with diffusers.")
    folder.mkdir()
    request = {
        "classes": architecture.classes,
        "configs": architecture.configs,
        "tokenizers": architecture.tokenizers,
        "pipeline": architecture.pipeline,
        "scheduler": architecture.scheduler,
        "variant": model.variant,
        "dtype": dtype_of(model),
        "seed": _SEED,
        "folder": str(folder),
    }
    script = Path(stand_in_worker.__file__)
    done = command.run([python, script], stdin=json.dumps(request), timeout_seconds=_TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise FirstlightError(f"the stand-in of {name} could not be built by {python}: {done.tail(4)}")
    text = _SAID.format(name=repo_of(name), repo=model.repo, architecture=model.architecture)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _place(staging: Path) -> None:
    """Turn the files into blobs by their hashes, and a snapshot by the hash of them all."""
    files = staging / "files"
    blobs = staging / "blobs"
    blobs.mkdir()
    named = {}
    for path in sorted(each for each in files.rglob("*") if each.is_file()):
        named[path.relative_to(files).as_posix()] = blob = digests.hash_file(path, "sha256")
        path.replace(blobs / blob)
    shutil.rmtree(files)
    revision = _revision(named)
    link(staging, revision, named.items())
    write_atomic(staging / "refs" / "main", revision)


def _revision(named: dict[str, str]) -> str:
    """The hash of what it is made of, {path: blob}."""
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:40]
