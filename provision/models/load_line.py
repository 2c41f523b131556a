"""The line of Python that loads a model: what a person pastes after a setup or a pull."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from provision.core.errors import SpecError
from provision.models import architectures, snapshots, stand_ins, verify
from provision.models.verify import Depth

if TYPE_CHECKING:
    from pathlib import Path

    from provision.config.models import ModelSpec
    from provision.core.layout import Root
    from provision.models.architectures import Architecture


def line(repo: str, model: ModelSpec, architecture: Architecture | None, revision: str | None = None) -> str | None:
    """Return the line that loads exactly the files of an entry.

    Args:
        repo: the id to load by: the model's own, or a stand-in's.
        model: its entry.
        architecture: what it is made of; None where that is not known.
        revision: the commit, where refs/main does not name it.

    Returns:
        None where it is not known which class loads it.
    """
    named = {"revision": revision, "variant": model.variant}
    shown = [json.dumps(repo), *(f"{key}={json.dumps(value)}" for key, value in named.items() if value)]
    kind, is_generator = "DiffusionPipeline", False
    if architecture is None:
        if not any(file.path == "model_index.json" for file in model.files):
            return None
    elif architecture.is_flat:
        _, kind = next(iter(architecture.classes.values()))
        is_generator = architecture.pipeline is not None
    if not is_generator:  # small ones are run as they are stored
        shown.append("torch_dtype=torch.float16")
    if architecture is not None:
        lacking = architecture.beside - stand_ins.parts_of(model, architecture)
        shown += [f"{part}=None" for part in sorted(lacking)]
    return f"{kind}.from_pretrained({', '.join(shown)})"


def of_model(root: Root, model: ModelSpec, architecture: Architecture | None) -> str | None:
    """Return the line for a model of this cache: with its revision where refs/main names another one that is here."""
    folder = root.hub_in_use / model.folder
    main = snapshots.main(folder)
    is_other = bool(main) and main != model.revision and (folder / "snapshots" / main).is_dir()
    return line(model.repo, model, architecture, model.revision if is_other else None)


def of_stand_in(name: str, model: ModelSpec, architecture: Architecture | None) -> str | None:
    """Return the line for the stand-in of a model."""
    return line(stand_ins.repo_of(name), model, architecture)


def here(root: Root, envs: Path, name: str, model: ModelSpec) -> str | None:
    """Return the line for a model, or for its stand-in where that is here and the model is not."""
    architecture = known(envs, model)
    snapshot = root.hub_in_use / model.folder / "snapshots" / model.revision
    is_whole = all(each.state == "ok" for each in verify.look(snapshot, model.files, Depth.SIZE))
    if not is_whole and stand_ins.snapshot_of(root, name) is not None:
        return of_stand_in(name, model, architecture)
    return of_model(root, model, architecture)


def known(envs: Path, model: ModelSpec) -> Architecture | None:
    """Return a model's architecture; None where there is no file of it."""
    try:
        return architectures.load(envs, model.architecture)
    except SpecError:
        return None
