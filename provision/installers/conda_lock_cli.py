"""Solves conda packages with the program conda-lock, as an alternative to rattler.

conda-lock requires conda, mamba or micromamba, and is installed into a venv of its own.
"""

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
    """Return the conda packages that satisfy specs, as solved by conda-lock.

    Args:
        specs: the requested packages, in conda's syntax, such as "numpy>=2".
        channels: the names or URLs of the channels.
        platforms: conda's names of the platforms, such as "linux-64".
        mirrored: {official URL of a channel: URL of its mirror}. conda-lock writes the URLs of mirrors into its output.

    Returns:
        The packages of all platforms, with official URLs.

    Raises:
        BlockedError: no conda, mamba or micromamba is installed. conda-lock would try to download one of them.
        CommandError: conda-lock has failed.
        SpecError: the output of conda-lock is not a lock file of version 1.
    """
    solver = os.environ.get("CONDA_EXE") or next(filter(None, map(shutil.which, _SOLVERS)), None)
    if solver is None or shutil.which(solver) is None:
        raise BlockedError(
            f"conda-lock needs one of {', '.join(_SOLVERS)}, and none is on the PATH. Install one of them, or lock "
            f"without conda-lock: {layout.program()} env lock (rattler writes the same format)."
        )
    with tempfile.TemporaryDirectory() as scratch:
        inputs, lock, names = (Path(scratch) / name for name in ("environment.yml", "conda-lock.yml", "names.json"))
        inputs.write_text(json.dumps({"channels": list(channels), "dependencies": list(specs)}), encoding="utf-8")
        names.write_text("{}", encoding="utf-8")  # without a table of pip's package names, conda-lock downloads one
        argv: list[str | Path] = [
            _conda_lock_program(),
            "lock",
            "--file",
            inputs,
            "--lockfile",
            lock,
            "--conda",
            solver,
        ]
        argv += ["--pypi_to_conda_lookup_file", names.as_uri()]
        argv += [word for platform in platforms for word in ("--platform", platform)]
        process.run(argv, env=child_environment.child(os.environ) | {"CONDA_EXE": solver})
        packages = conda_lock.read_lock(lock)
    return [replace(package, url=conda_settings.official_url(package.url, mirrored)) for package in packages]


def _conda_lock_program() -> Path:
    """Return the path of the program conda-lock; install it first if it is not on the PATH.

    It is installed from `toolbox/interop.lock` into a venv of its own, because its packages conflict with those of the
    toolbox, the venv in which firstlight runs.
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
