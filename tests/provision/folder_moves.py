"""Provides the relocation step of one folder, and helpers that the tests of folder moves share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision.core.layout import Root
from provision.host.tool_caches import RelocatedFolder
from provision.relocation.step import RelocateStep
from provision.volume.journal import Journal
from provision.volume.marker import VolumeStep

if TYPE_CHECKING:
    from collections.abc import Callable


def relocation_step(source: Path, volume: Path, variable: str | None = None) -> RelocateStep:
    """Return the step that relocates `source` to the hub cache of the root `volume`; make the root's marker if absent.

    `variable` is the environment variable that names the target folder where no link can be made.
    """
    root = Root(volume)
    if not root.marker.exists():
        VolumeStep(root, [], Journal(root.journal)).apply()
    folder = RelocatedFolder(source, root.hub, variable)
    return RelocateStep("huggingface", [folder], root, Path(os.environ["HOME"]), Journal(root.journal))


def target(step: RelocateStep) -> Path:
    return step.places[0].target


def leftovers(*folders: Path) -> list[str]:
    """Return the paths of firstlight's temporary files and folders below the folders."""
    return [str(path) for folder in folders for path in folder.rglob(".*.firstlight-*")]


def raise_errno(code: int) -> Callable[..., None]:
    """Return a function that accepts any arguments and raises an OSError with the errno `code`."""

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail
