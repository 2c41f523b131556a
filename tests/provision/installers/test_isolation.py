"""Tests that child processes import no module from the current folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from provision.core.errors import FirstlightError
from provision.environments.smoke_test import SmokeStep
from provision.installers import rattler

if TYPE_CHECKING:
    from provision.core.layout import Root

FOREIGN = "raise SystemExit('a module of the current folder was imported')\n"


@pytest.fixture(autouse=True)
def _shadowing_modules() -> None:
    for name in ("torch", "diffusers", "typing_extensions", "asyncio"):
        Path(f"{name}.py").write_text(FOREIGN)
    Path("provision").mkdir()
    Path("provision/__init__.py").write_text(FOREIGN)


def test_rattler_worker_ignores_modules_of_the_current_folder(tmp_path: Path) -> None:
    with pytest.raises(FirstlightError, match="conda packages: 'cache'"):
        rattler._run_worker({"action": "solve", "platform": "none"}, tmp_path)


def test_smoke_test_ignores_modules_of_the_current_folder(root: Root) -> None:
    python = root.prefix("diffusers") / "bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    with pytest.raises(FirstlightError, match="No module named 'torch'"):
        SmokeStep(root, "diffusers")._run()
