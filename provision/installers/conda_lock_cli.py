"""Solves conda packages with the program conda-lock, as an alternative to rattler; it needs conda and its own venv."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import child_environment, layout, process
from provision.core.errors import BlockedError
from provision.installers import conda_settings
from provision.installers import uv as uv_installer
from provision.lockfiles import conda_lock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from provision.lockfiles.conda_lock import CondaPackage

_SOLVERS = ("conda", "mamba", "micromamba")


def solve(
    specs: Sequence[str], channels: Sequence[str], platforms: Sequence[str], mirrored: Mapping[str, str]
) -> list[CondaPackage]:
    """Solve specs with conda-lock.

    Args:
        specs: the requested packages, in conda's syntax.
        channels: the names or addresses of the channels.
        platforms: conda's names of the platforms.
        mirrored: {official address of a channel: address of its mirror}. conda-lock writes addresses of the mirror.

    Returns:
        The packages, with official addresses.

    Raises:
        BlockedError: no conda, mamba or micromamba is installed; conda-lock would try to download one.
        CommandError: conda-lock has failed.
        SpecError: the output of conda-lock is not a lock of version 1.
    """
    solver = os.environ.get("CONDA_EXE") or next(filter(None, map(shutil.which, _SOLVERS)), None)
    if solver is None or shutil.which(solver) is None:
        raise BlockedError(
            f"conda-lock needs one of {', '.join(_SOLVERS)}, and none is on the PATH. Install one, or lock without it: "
            f"{layout.program()} env lock (rattler solves, and writes the same format)."
        )
    with tempfile.TemporaryDirectory() as scratch:
        inputs, lock, names = (Path(scratch) / name for name in ("environment.yml", "conda-lock.yml", "names.json"))
        inputs.write_text(json.dumps({"channels": list(channels), "dependencies": list(specs)}), encoding="utf-8")
        names.write_text("{}", encoding="utf-8")  # without a table of pip's names, conda-lock would download one
        argv: list[str | Path] = [_tool(), "lock", "--file", inputs, "--lockfile", lock, "--conda", solver]
        argv += ["--pypi_to_conda_lookup_file", names.as_uri()]
        argv += [word for platform in platforms for word in ("--platform", platform)]
        process.run(argv, env=child_environment.child(os.environ) | {"CONDA_EXE": solver})
        packages = conda_lock.read_lock(lock)
    return [replace(package, url=conda_settings.official_url(package.url, mirrored)) for package in packages]


def _tool() -> Path:
    """Return the path of conda-lock: from the PATH, or installed from its lock file into a venv.

    The venv is beside the toolbox, since the packages of the two conflict.
    """
    program = shutil.which("conda-lock")
    if program:
        return Path(program)
    folder = layout.tool_folder("conda-lock")
    uv = uv_installer.for_uv(os.environ, folder.parent / "uv", offline=False)
    python = layout.interpreter(folder)
    if not python.exists():
        venv: list[str | Path] = ["venv", "--quiet", "--no-project", "--python", uv_installer.base_python(), folder]
        uv_installer.run_uv(venv, uv)
    pinned = layout.shipped_envs() / "toolbox" / "interop.lock"
    install: list[str | Path] = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", pinned]
    uv_installer.run_uv([*install, *uv.flags, "--python", python], uv)
    return python.parent / "conda-lock"
