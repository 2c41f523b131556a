"""A folder of the home and the step that moves it, as the tests of the move share them."""

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


def moving(source: Path, volume: Path, variable: str | None = None) -> RelocateStep:
    root = Root(volume)
    if not root.marker.exists():
        VolumeStep(root, [], Journal(root.journal)).apply()
    place = RelocatedFolder(source, root.hub, variable)
    return RelocateStep("huggingface", [place], root, Path(os.environ["HOME"]), Journal(root.journal))


def target(step: RelocateStep) -> Path:
    return step.places[0].target


def leftovers(*folders: Path) -> list[str]:
    return [str(path) for folder in folders for path in folder.rglob(".*.firstlight-*")]


def refuse(code: int) -> Callable[..., None]:
    def refusing(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    return refusing
