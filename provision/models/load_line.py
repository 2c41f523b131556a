"""Builds the line of Python code that loads a model, such as `DiffusionPipeline.from_pretrained("owner/name")`.

Setup and pull print it, so that the user can paste it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from provision.core.errors import SpecError
from provision.models import architectures, main_ref, stand_ins, verify
from provision.models.verify import Depth

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.models.architectures import Architecture


def line(repo: str, model: ModelSpec, architecture: Architecture | None, revision: str | None = None) -> str | None:
    """Return the line of code that loads exactly the files of an entry.

    Args:
        repo: the id to load: that of the model's repository or of its stand-in.
        model: the entry of the manifest.
        architecture: its architecture; None if it is unknown.
        revision: the commit to name in the line; None if refs/main has the right commit.

    Returns:
        The line; None if the class that loads the model is unknown.
    """
    options = {"revision": revision, "variant": model.variant}
    arguments = [json.dumps(repo), *(f"{key}={json.dumps(value)}" for key, value in options.items() if value)]
    class_name, is_flat_pipeline = "DiffusionPipeline", False
    if architecture is None:
        if not any(file.path == "model_index.json" for file in model.files):
            return None
    elif architecture.is_flat:
        _, class_name = next(iter(architecture.classes.values()))
        is_flat_pipeline = architecture.pipeline is not None
    if not is_flat_pipeline:  # a pipeline whose repository is flat is small, and runs in its stored dtype
        arguments.append("torch_dtype=torch.float16")
    if architecture is not None:
        missing = architecture.optional - stand_ins.parts_of(model, architecture)
        arguments += [f"{component}=None" for component in sorted(missing)]
    return f"{class_name}.from_pretrained({', '.join(arguments)})"


def of_model(root: Root, model: ModelSpec, architecture: Architecture | None) -> str | None:
    """Return the line for a model in the hub cache; None as for `line`.

    The line names the revision if refs/main is another commit that is present.
    """
    folder = root.hub_in_use / model.folder
    main = main_ref.read_main(folder)
    is_other = bool(main) and main != model.revision and (folder / "snapshots" / main).is_dir()
    return line(model.repo, model, architecture, model.revision if is_other else None)


def of_stand_in(name: str, model: ModelSpec, architecture: Architecture | None) -> str | None:
    """Return the line for the stand-in of a model; None as for `line`."""
    return line(stand_ins.repo_of(name), model, architecture)


def of_cached(root: Root, envs: Path, name: str, model: ModelSpec) -> str | None:
    """Return the line for a model, or for its stand-in if only the stand-in is complete; None as for `line`."""
    architecture = architecture_of(envs, model)
    snapshot = root.hub_in_use / model.folder / "snapshots" / model.revision
    is_whole = all(file.state == "ok" for file in verify.check_files(snapshot, model.files, Depth.SIZE))
    if not is_whole and stand_ins.snapshot_of(root, name) is not None:
        return of_stand_in(name, model, architecture)
    return of_model(root, model, architecture)


def architecture_of(envs: Path, model: ModelSpec) -> Architecture | None:
    """Return a model's architecture; None if the architecture is unknown."""
    try:
        return architectures.load(envs, model.architecture)
    except SpecError:
        return None
