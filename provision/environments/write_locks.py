"""Writes an environment's locks: conda's part solved by rattler, pip's by uv; every package by hash, for any mirror."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from provision.config import toml
from provision.config import torch as torch_config
from provision.core.errors import SpecError
from provision.fs.atomic import write_atomic
from provision.installers import conda_lock_cli, rattler, uv_settings
from provision.installers import uv as uv_installer
from provision.lockfiles import conda_lock, requirements
from provision.lockfiles.conda_lock import package_name
from provision.mirrors import probe_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from provision.config.torch import Variant
    from provision.lockfiles.conda_lock import CondaPackage

_HEADER = "# Written by `provision env lock`: hashes, and no URLs. Do not edit.\n"
_TOOLBOX_PYTHON = "3.10"
_SYS_PLATFORM = {"linux": "linux", "darwin": "darwin", "windows": "win32"}
# uv resolves for one system only where a project says so.
_PROJECT = """\
[project]
name = "lock"
version = "0"
requires-python = ">={python}"
"""
# The oldest systems that a solution should run on (source: the floors of conda-forge's own builds).
_VIRTUAL = {
    "linux": ("__unix=0", "__linux=4.18", "__glibc=2.17"),
    "osx": ("__unix=0", "__osx=11.0"),
    "win": ("__win=0",),
}


def lock(envs: Path, name: str, host: LockHost) -> list[Path]:
    """Write the locks of an environment: its conda part, then one of pip for each build of torch, or a single one.

    Args:
        envs: the folder that holds torch.toml and the environment's folder.
        name: the environment; for the toolbox, its three locks are written.
        host: what this machine knows of mirrors, and for which platforms conda's part is solved.

    Raises:
        SpecError: there is no such environment, torch.toml is wrong, or conda and pip are asked for one package.
        FirstlightError: a resolver found no solution, or its source does not answer.
    """
    inputs = {
        file.parent.name for pattern in ("requirements.in", "environment.yml") for file in envs.glob(f"*/{pattern}")
    }
    folder = envs / toml.choose(name, sorted(inputs), "environment")
    if name == "toolbox":
        user, developer = folder / "requirements.in", folder / "dev.in"
        return [
            _write(folder / "requirements.lock", _compile([user], _TOOLBOX_PYTHON)),
            _write(folder / "dev.lock", _compile([user, developer], _TOOLBOX_PYTHON)),
            _write(folder / "interop.lock", _compile([folder / "interop.in"], _TOOLBOX_PYTHON)),
        ]
    solved: list[CondaPackage] = []
    written = []
    if (folder / "environment.yml").exists() and not host.keep_conda:
        solved = solve_conda(folder, host)
        written.append(_write_conda(folder, solved))
    chosen: dict[str, list[dict[str, object]]] = {}
    torch = toml.load(envs / "torch.toml", torch_config.TorchSpec)
    with tempfile.TemporaryDirectory() as scratch:
        asked = _asked_of_pip(folder, Path(scratch))
        pins = Path(scratch) / "conda.txt"
        pins.write_text(_conda_pins(folder), encoding="utf-8")
        wanted = asked.read_text(encoding="utf-8").splitlines() if asked else []
        builds = torch.variant if any(package_name(line) == "torch" for line in wanted) else [None] if asked else []
        for variant in builds:
            pin = Path(scratch) / "torch.txt"
            pin.write_text(f"torch=={variant.torch}\n" if variant else "", encoding="utf-8")
            assert asked is not None  # noqa: S101 (for the type alone: without it there is no build)
            text = _compile([asked], torch.python[0], variant, constraints=[pins, pin])
            name = variant.name if variant else "requirements"
            written.append(_write(folder / f"{name}.lock", add_hashes(text, variant) if variant else text))
            chosen[name] = probe_files_of(written[-1], torch.python[0], variant)
    return [*written, *probe_files.write(folder, chosen, probe_files.select_from_solution(solved))]


def probe_files_of(lock_file: Path, python: str, variant: Variant | None) -> list[dict[str, object]]:
    """The files of a pip lock by which a mirror is judged; PEP 751's form of the lock tells their sizes and times."""
    # A build of its own such as 2.13.0+cpu lies on no index that is mirrored, and may be here for one Python alone.
    text = lock_file.read_text(encoding="utf-8")
    own = {name for name, (version, _) in requirements.hashes(text).items() if "+" in version}
    with tempfile.TemporaryDirectory() as scratch:
        asked = Path(scratch) / "requirements.txt"
        asked.write_text(requirements.without(text, own), encoding="utf-8")
        return probe_files.select_from_pylock(
            _compile([asked], python, variant, name="pylock.toml", flags=["--no-deps"])
        )


@dataclass(frozen=True)
class LockHost:
    """How conda's part of a lock is solved.

    `platforms`: None takes those of environment.yml, else of the lock that is there, else all that conda-forge builds.
    """

    platforms: Sequence[str] | None
    mirrors: Mapping[str, str]
    virtual: Sequence[str]
    keep_conda: bool = False
    tool: str = "rattler"


def solve_conda(folder: Path, host: LockHost) -> list[CondaPackage]:
    """Solve environment.yml for each platform; addresses are the channels' own.

    Raises:
        SpecError: environment.yml is wrong.
        FirstlightError: a channel does not answer, or there is no solution.
    """
    asked = conda_lock.read_environment(folder / "environment.yml")
    target = folder / "conda-lock.yml"
    there = conda_lock.read_lock(target) if target.exists() else []
    platforms = host.platforms or asked.platforms or sorted({each.platform for each in there}) or conda_lock.PLATFORMS
    specs = [text for text, _ in asked.conda]
    if host.tool == "conda-lock":
        if host.virtual:
            raise SpecError("--virtual is for rattler; conda-lock takes virtual packages from a file of its own.")
        return conda_lock_cli.solve(specs, asked.channels, platforms, host.mirrors)
    packages = []
    with tempfile.TemporaryDirectory() as cache:
        for platform in platforms:
            virtual = [*_VIRTUAL.get(platform.partition("-")[0], ()), *host.virtual]
            packages += rattler.solve(specs, asked.channels, platform, virtual, host.mirrors, Path(cache))
    return packages


def _write_conda(folder: Path, packages: Sequence[CondaPackage]) -> Path:
    target = folder / "conda-lock.yml"
    channels = conda_lock.read_environment(folder / "environment.yml").channels
    write_atomic(target, conda_lock.lock_text(packages, channels, ["environment.yml"]))
    return target


def _asked_of_pip(folder: Path, scratch: Path) -> Path | None:
    """The requirements of the pip part: requirements.in, else the `pip:` section of environment.yml."""
    written = folder / "requirements.in"
    if not (folder / "environment.yml").exists():
        return written
    environment = conda_lock.read_environment(folder / "environment.yml")
    if written.exists() and environment.pip:
        line = environment.pip[0][1]
        raise SpecError(
            f"{folder / 'environment.yml'}, line {line}: pip's packages stand in requirements.in too. Keep one place."
        )
    if written.exists():
        conda = {package_name(text): (text, line) for text, line in environment.conda}
        for number, asked in enumerate(written.read_text(encoding="utf-8").splitlines(), start=1):
            if not asked.startswith("#") and package_name(asked) in conda:
                text, line = conda[package_name(asked)]
                raise SpecError(
                    f"{folder / 'environment.yml'}, line {line} asks conda for {text}, {written}, line {number} asks "
                    f"pip for {asked}: the one would overwrite the other. Keep one of the two lines."
                )
        return written
    if not environment.pip:
        return None
    section = scratch / "requirements.in"
    section.write_text("".join(f"{text}\n" for text, _ in environment.pip), encoding="utf-8")
    return section


def _conda_pins(folder: Path) -> str:
    """What conda's part holds of Python packages, as constraints: pip must leave these as they are."""
    file = folder / "conda-lock.yml"
    packages = conda_lock.read_lock(file) if file.exists() else []
    return "".join(sorted({f"{each.name}=={each.version}\n" for each in packages if each.is_python}))


def _compile(
    inputs: Sequence[Path],
    python: str,
    variant: Variant | None = None,
    *,
    constraints: Sequence[Path] = (),
    name: str = "lock",
    flags: Sequence[str] = (),
) -> str:
    """Resolve for every Python from `python` on, and for every platform or that of the variant.

    `name` of what uv writes says in which form.
    """
    with tempfile.TemporaryDirectory() as scratch:
        uv = uv_installer.for_uv(os.environ, Path(scratch) / "cache", offline=False)
        env = dict(uv.environment)
        # A lock has to list the hashes of every platform's wheels, so it is written from one whole index: what
        # this machine adds to it (a folder of a few wheels) would be taken for all there is.
        env.pop("UV_INDEX", None)
        if variant is None or variant.find_links is None:
            env.pop("UV_FIND_LINKS", None)
        else:
            env.setdefault("UV_FIND_LINKS", variant.find_links)
        written = Path(scratch) / name
        asked: list[str | Path] = ["--quiet", "--universal", "--generate-hashes", "--no-emit-index-url"]
        asked += ["--no-annotate", "--no-header", "--directory", scratch, *flags]
        for each in constraints:
            asked += ["--constraints", each]
        if variant is not None:
            # uv reads a project's settings only together with the user's: those are shown an empty folder.
            only = [f"sys_platform == '{_SYS_PLATFORM[variant.system]}'"]
            project = _PROJECT.format(python=python)
            project += uv_settings.write({"environments": only, **uv.config}, "tool.uv")
            (Path(scratch) / "pyproject.toml").write_text(project, encoding="utf-8")
            env.pop("UV_NO_CONFIG")
            env |= {"UV_NO_SYSTEM_CONFIG": "1", "XDG_CONFIG_HOME": scratch, "APPDATA": scratch}
            uv = replace(uv, config={})
        asked += ["--python-version", python, *inputs, "-o", written]
        uv_installer.run_uv(["pip", "compile", *asked], replace(uv, environment=env))
        return written.read_text(encoding="utf-8")


def _write(target: Path, text: str) -> Path:
    write_atomic(target, _HEADER + text)
    return target


def add_hashes(text: str, variant: Variant) -> str:
    """Give torch's entry the hashes of the builds for other Pythons, which only torch.toml knows."""
    lines = text.splitlines()
    wanted = f"torch=={variant.torch}"
    start = next((number for number, line in enumerate(lines) if line.split(" ")[0] == wanted), None)
    if start is None or not variant.hashes:
        return text
    end = start + 1
    while end < len(lines) and lines[end].startswith(" "):
        end += 1
    known = {line.strip(" \\").removeprefix("--hash=sha256:") for line in lines[start + 1 : end]}
    every = sorted(known | set(variant.hashes))
    entry = [f"{lines[start].rstrip(chr(92) + ' ')} \\"]
    entry += [f"    --hash=sha256:{digest} \\" for digest in every]
    entry[-1] = entry[-1].removesuffix(" \\")
    return "\n".join([*lines[:start], *entry, *lines[end:]]) + "\n"
