"""Writes the lock files of an environment, which rattler and uv solve.

The pip lock files have hashes and no URLs, so packages can be installed from any mirror.
"""

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
# The pyproject.toml with which uv resolves for a single operating system; uv has no command-line option for that.
_PROJECT = """\
[project]
name = "lock"
version = "0"
requires-python = ">={python}"
"""
# {system: the virtual packages of its oldest supported version}. Source: the minimum versions of conda-forge's builds.
_VIRTUAL_PACKAGES = {
    "linux": ("__unix=0", "__linux=4.18", "__glibc=2.17"),
    "osx": ("__unix=0", "__osx=11.0"),
    "win": ("__win=0",),
}


def lock(envs: Path, name: str, options: SolverOptions) -> list[Path]:
    """Write the lock files and the list of probe files of an environment, and return the paths of the written files.

    There is one conda lock file if the environment has an environment.yml. There is one pip lock file for each variant
    of torch, or a single one if the environment has no torch.

    Args:
        envs: the folder with torch.toml and a folder for each environment.
        name: the name of the environment; "toolbox" has three pip lock files of its own.
        options: the options for the conda packages.

    Raises:
        SpecError: the environment does not exist, torch.toml is invalid, or the same package is required from conda
            and pip.
        FirstlightError: there is no solution, or an index or channel is unavailable.
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
    paths = []
    if (folder / "environment.yml").exists() and not options.keep_conda:
        solved = solve_conda(folder, options)
        paths.append(_write_conda(folder, solved))
    probe_rows: dict[str, list[dict[str, object]]] = {}
    torch = toml.load(envs / "torch.toml", torch_config.TorchSpec)
    with tempfile.TemporaryDirectory() as scratch:
        pip_input = _pip_requirements(folder, Path(scratch))
        conda_pins = Path(scratch) / "conda.txt"
        conda_pins.write_text(_conda_pins(folder), encoding="utf-8")
        lines = pip_input.read_text(encoding="utf-8").splitlines() if pip_input else []
        has_torch = any(package_name(line) == "torch" for line in lines)
        for variant in torch.variant if has_torch else [None] if pip_input else []:
            torch_pin = Path(scratch) / "torch.txt"
            torch_pin.write_text(f"torch=={variant.torch}\n" if variant else "", encoding="utf-8")
            assert pip_input is not None  # noqa: S101 (for mypy only: without it there is no variant)
            text = _compile([pip_input], torch.python[0], variant, constraints=[conda_pins, torch_pin])
            name = variant.name if variant else "requirements"
            paths.append(_write(folder / f"{name}.lock", add_hashes(text, variant) if variant else text))
            probe_rows[name] = probe_files_of(paths[-1], torch.python[0], variant)
    return [*paths, *probe_files.write(folder, probe_rows, probe_files.select_from_solution(solved))]


def probe_files_of(lock_file: Path, python: str, variant: Variant | None) -> list[dict[str, object]]:
    """Return the rows for probe files of a pip lock file: small files that a probe downloads from a mirror.

    uv resolves the lock file again in the format of PEP 751, which has the size and upload time of each file.

    Args:
        lock_file: the path of the pip lock file.
        python: the oldest Python version, such as "3.11".
        variant: the variant of torch in the lock file; None without torch.
    """
    # A local version such as 2.13.0+cpu is on no mirror of an index, and may have a wheel for one Python version only.
    text = lock_file.read_text(encoding="utf-8")
    local = {name for name, (version, _) in requirements.hashes(text).items() if "+" in version}
    with tempfile.TemporaryDirectory() as scratch:
        pip_input = Path(scratch) / "requirements.txt"
        pip_input.write_text(requirements.without(text, local), encoding="utf-8")
        return probe_files.select_from_pylock(
            _compile([pip_input], python, variant, name="pylock.toml", flags=["--no-deps"])
        )


@dataclass(frozen=True)
class SolverOptions:
    """Hold the options with which the conda packages of an environment are solved.

    `platforms`: conda's names of the platforms, such as "linux-64"; None: those in environment.yml, else those in the
        existing lock file, else all known platforms.
    `mirrors`: {official URL of a channel: URL of its mirror}.
    `virtual`: additional virtual packages, such as "__cuda=12.8".
    `keep_conda`: keep the existing conda lock file.
    `tool`: the solver, "rattler" or "conda-lock".
    """

    platforms: Sequence[str] | None
    mirrors: Mapping[str, str]
    virtual: Sequence[str]
    keep_conda: bool = False
    tool: str = "rattler"


def solve_conda(folder: Path, options: SolverOptions) -> list[CondaPackage]:
    """Return the conda packages that satisfy a folder's environment.yml on each platform, with official URLs.

    Args:
        folder: the folder of the environment in envs/.
        options: the options of the solver.

    Raises:
        SpecError: environment.yml is not valid, or an option is not for this solver.
        FirstlightError: there is no solution, or a channel is unavailable.
    """
    environment = conda_lock.read_environment(folder / "environment.yml")
    target = folder / "conda-lock.yml"
    locked = conda_lock.read_lock(target) if target.exists() else []
    locked_platforms = sorted({package.platform for package in locked})
    platforms = options.platforms or environment.platforms or locked_platforms or conda_lock.PLATFORMS
    specs = [spec for spec, _ in environment.conda]
    if options.tool == "conda-lock":
        if options.virtual:
            raise SpecError(
                "--virtual is for rattler; conda-lock reads virtual packages from its own file. Omit --virtual."
            )
        return conda_lock_cli.solve(specs, environment.channels, platforms, options.mirrors)
    packages = []
    with tempfile.TemporaryDirectory() as cache:
        for platform in platforms:
            virtual = [*_VIRTUAL_PACKAGES.get(platform.partition("-")[0], ()), *options.virtual]
            packages += rattler.solve(specs, environment.channels, platform, virtual, options.mirrors, Path(cache))
    return packages


def _write_conda(folder: Path, packages: Sequence[CondaPackage]) -> Path:
    target = folder / "conda-lock.yml"
    channels = conda_lock.read_environment(folder / "environment.yml").channels
    write_atomic(target, conda_lock.lock_text(packages, channels, ["environment.yml"]))
    return target


def _pip_requirements(folder: Path, scratch: Path) -> Path | None:
    """Return the path of a file with the requirements for pip; None if there are none.

    It is requirements.in of the folder, or else a new file in `scratch` with the `pip:` list of environment.yml.

    Raises:
        SpecError: both lists exist, or the same package is required from conda and pip.
    """
    file = folder / "requirements.in"
    if not (folder / "environment.yml").exists():
        return file
    environment = conda_lock.read_environment(folder / "environment.yml")
    if file.exists() and environment.pip:
        line = environment.pip[0][1]
        raise SpecError(
            f"{folder / 'environment.yml'}, line {line}: requirements.in also lists pip's packages. Keep one list."
        )
    if file.exists():
        conda = {package_name(spec): (spec, line) for spec, line in environment.conda}
        for number, requirement in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if not requirement.startswith("#") and package_name(requirement) in conda:
                spec, line = conda[package_name(requirement)]
                raise SpecError(
                    f"{folder / 'environment.yml'}, line {line} requests {spec} from conda, and {file}, line {number} "
                    f"requests {requirement} from pip; pip would overwrite conda's files. Keep one of the two lines."
                )
        return file
    if not environment.pip:
        return None
    section = scratch / "requirements.in"
    section.write_text("".join(f"{text}\n" for text, _ in environment.pip), encoding="utf-8")
    return section


def _conda_pins(folder: Path) -> str:
    """Return the text of a constraints file with the Python packages of the conda lock file.

    With these constraints, the pip lock files have the same versions of these packages.
    """
    file = folder / "conda-lock.yml"
    packages = conda_lock.read_lock(file) if file.exists() else []
    return "".join(sorted({f"{package.name}=={package.version}\n" for package in packages if package.is_python}))


def _compile(
    inputs: Sequence[Path],
    python: str,
    variant: Variant | None = None,
    *,
    constraints: Sequence[Path] = (),
    name: str = "lock",
    flags: Sequence[str] = (),
) -> str:
    """Resolve requirements with uv, and return the text of the lock file.

    The lock file is for all Python versions from `python` on. It is for the operating system of the variant, or for all
    platforms without a variant.

    Args:
        inputs: the paths of the files with the requirements.
        python: the oldest Python version, such as "3.11".
        variant: the variant of torch, with the page of its builds and its operating system; None without torch.
        constraints: the paths of files with versions that the lock file must have.
        name: the file name of uv's output, by which uv selects the format.
        flags: further arguments for uv.
    """
    with tempfile.TemporaryDirectory() as scratch:
        uv = uv_installer.for_uv(os.environ, Path(scratch) / "cache", offline=False)
        env = dict(uv.environment)
        # A lock file needs the hashes of the wheels for all platforms, so only one complete index is used. If another
        # index had only a few wheels of a package, uv would write only the hashes of these wheels.
        env.pop("UV_INDEX", None)
        if variant is None or variant.find_links is None:
            env.pop("UV_FIND_LINKS", None)
        else:
            env.setdefault("UV_FIND_LINKS", variant.find_links)
        output = Path(scratch) / name
        arguments: list[str | Path] = ["--quiet", "--universal", "--generate-hashes", "--no-emit-index-url"]
        arguments += ["--no-annotate", "--no-header", "--directory", scratch, *flags]
        for constraint in constraints:
            arguments += ["--constraints", constraint]
        if variant is not None:
            # uv reads the user's settings together with a project's. So the folder of the user's settings is set to
            # `scratch`, which has none.
            systems = [f"sys_platform == '{_SYS_PLATFORM[variant.system]}'"]
            project = _PROJECT.format(python=python)
            project += uv_settings.write({"environments": systems, **uv.config}, "tool.uv")
            (Path(scratch) / "pyproject.toml").write_text(project, encoding="utf-8")
            env.pop("UV_NO_CONFIG")
            env |= {"UV_NO_SYSTEM_CONFIG": "1", "XDG_CONFIG_HOME": scratch, "APPDATA": scratch}
            uv = replace(uv, config={})
        arguments += ["--python-version", python, *inputs, "-o", output]
        uv_installer.run_uv(["pip", "compile", *arguments], replace(uv, environment=env))
        return output.read_text(encoding="utf-8")


def _write(target: Path, text: str) -> Path:
    write_atomic(target, _HEADER + text)
    return target


def add_hashes(text: str, variant: Variant) -> str:
    """Add the hashes of torch in torch.toml to the entry of torch in a lock file.

    They are the hashes of wheels for other Python versions, which uv does not list.

    Args:
        text: the text of the lock file.
        variant: the variant of torch in the lock file.

    Returns:
        The new text; `text` itself if it has no entry for torch, or the variant has no hashes.
    """
    lines = text.splitlines()
    pinned = f"torch=={variant.torch}"
    start = next((number for number, line in enumerate(lines) if line.split(" ")[0] == pinned), None)
    if start is None or not variant.hashes:
        return text
    end = start + 1
    while end < len(lines) and lines[end].startswith(" "):
        end += 1
    listed = {line.strip(" \\").removeprefix("--hash=sha256:") for line in lines[start + 1 : end]}
    hashes = sorted(listed | set(variant.hashes))
    entry = [f"{lines[start].rstrip(chr(92) + ' ')} \\"]
    entry += [f"    --hash=sha256:{digest} \\" for digest in hashes]
    entry[-1] = entry[-1].removesuffix(" \\")
    return "\n".join([*lines[:start], *entry, *lines[end:]]) + "\n"
