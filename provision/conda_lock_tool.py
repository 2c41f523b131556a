"""Locks conda's part with conda-lock itself, for those who want its solver: it needs conda and a venv of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from provision import command, paths, sources
from provision.errors import BlockedError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SOLVERS = ("conda", "mamba", "micromamba")


def lock(environment: Path, target: Path, platforms: Sequence[str]) -> None:
    """Write `target` from environment.yml with conda-lock.

    Raises:
        BlockedError: no conda, mamba or micromamba is here; conda-lock would try to download one.
        CommandError: conda-lock failed.
    """
    solver = os.environ.get("CONDA_EXE") or next(filter(None, map(shutil.which, _SOLVERS)), None)
    if solver is None or shutil.which(solver) is None:
        raise BlockedError(
            f"conda-lock needs one of {', '.join(_SOLVERS)}, and none is on the PATH. Install one, or lock without it: "
            f"{paths.program()} env lock (rattler solves, and writes the same format)."
        )
    flags = [word for platform in platforms for word in ("--platform", platform)]
    argv: list[str | Path] = [_tool(), "lock", "--file", environment, "--lockfile", target, "--conda", solver, *flags]
    command.run(argv, env=dict(os.environ) | {"CONDA_EXE": solver})


def _tool() -> Path:
    """conda-lock, from the PATH or installed by hash beside the toolbox, with which it cannot share a folder."""
    found = shutil.which("conda-lock")
    if found:
        return Path(found)
    folder = paths.tool_folder("conda-lock")
    uv = sources.for_uv(os.environ, folder.parent / "uv", offline=False)
    python = paths.interpreter(folder)
    if not python.exists():
        venv: list[str | Path] = ["venv", "--quiet", "--python", sources.base_python(), folder]
        command.run([sources.uv_binary(), *venv], env=uv.environment)
    pinned = paths.shipped_envs() / "toolbox" / "interop.lock"
    install: list[str | Path] = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", pinned]
    command.run([sources.uv_binary(), *install, *uv.flags, "--python", python], env=uv.environment)
    return python.parent / "conda-lock"
