"""Lists the conda and virtual environments of this host, with the conflicts between conda and pip in them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.environments.activation import conda_bases
from provision.environments.conda_pip_conflicts import conflicts, dist_infos
from provision.environments.prefix import conda_records, size_bytes
from provision.installers import conda_settings
from provision.lockfiles.requirements import normal
from provision.volume.environment_marker import read_owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.core.layout import Root


@dataclass(frozen=True)
class DiscoveredEnvironment:
    """Describe one environment of this host.

    `name`: the name of its folder, or "base". `prefix`: the path of its folder.
    `manager`: "conda" or "venv".
    `interpreter`: the Python version as text, such as "Python 3.11.7"; None if it is not known.
    `variant`: a variant such as "cu128" if firstlight built the environment, else a version such as "torch 2.13.0";
        None without torch.
    `packages`: the number of packages. `size_bytes`: the size of its files.
    `mixed`: a text for each package from pip that conflicts with conda.
    `activatable`: the command that activates the environment; None if there is no such command.
    `on_volume`: the environment is in the root.
    """

    name: str
    prefix: str
    manager: str
    interpreter: str | None
    variant: str | None
    packages: int
    mixed: tuple[str, ...]
    activatable: str | None
    size_bytes: int
    on_volume: bool

    def to_dict(self) -> dict[str, object]:
        """Return {name of the attribute: value} for JSON output."""
        return asdict(self)


def environments(root: Root, home: Path, environ: Mapping[str, str]) -> list[DiscoveredEnvironment]:
    """Return the environments in all usual folders of this host; those of the root come first.

    Args:
        root: the root, with the environments that firstlight has built.
        home: the user's home folder, with conda's settings and folders.
        environ: the environment variables; CONDA_*, VIRTUAL_ENV and WORKON_HOME contain further folders.
    """
    bases = conda_bases(environ, home)
    folders = _children(root.prefix(""))
    for base in bases:
        folders += [base, *_children(base / "envs")]
    for parent in _envs_dirs(environ, home):
        folders += _children(parent)
    registry = home / ".conda" / "environments.txt"  # conda's list of the environments that it has made
    if registry.is_file():
        folders += [Path(line) for line in registry.read_text(encoding="utf-8", errors="replace").split("\n") if line]
    folders += [Path(environ[name]) for name in ("CONDA_PREFIX", "VIRTUAL_ENV") if environ.get(name)]
    discovered: dict[Path, DiscoveredEnvironment] = {}
    for folder in folders:
        try:
            real = folder.resolve()
            if real not in discovered and ((real / "conda-meta").is_dir() or (real / "pyvenv.cfg").is_file()):
                discovered[real] = _describe(folder, real, root, bases)
        except (OSError, RuntimeError):
            continue  # a folder that this user cannot read, or a loop of links
    return list(discovered.values())


def _describe(folder: Path, real: Path, root: Root, bases: list[Path]) -> DiscoveredEnvironment:
    is_conda = (real / "conda-meta").is_dir()
    marker = read_owner(real) or {}
    infos = dist_infos(real)
    torch = next((info.name.removesuffix(".dist-info") for info in infos if info.name.startswith("torch-")), None)
    variant = marker.get("variant") or (torch.replace("-", " ") if torch else None)
    records = conda_records(real) if is_conda else {}
    if is_conda:
        version = records.get("python", {}).get("version")
        has_name = any(real.parent == base / "envs" for base in bases) or ".conda" in folder.parts
        command = f"conda activate {folder.name if has_name else real}" if bases else None
    else:
        config = (real / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^version(?:_info)?\s*=\s*(\S+)", config, re.MULTILINE)
        version = match.group(1) if match else None
        command = f". {real}/bin/activate" if (real / "bin" / "activate").exists() else None
    return DiscoveredEnvironment(
        name="base" if real in bases else folder.name,
        prefix=str(real),
        manager="conda" if is_conda else "venv",
        interpreter=f"Python {version}" if version else None,
        variant=str(variant) if variant else None,
        packages=len(records) + sum(normal(info.name.split("-")[0]) not in records for info in infos),
        mixed=tuple(conflicts(real)) if is_conda else (),
        activatable=command,
        # The folder of conda's base environment also contains the other environments and the package cache.
        size_bytes=size_bytes(real, ("envs", "pkgs") if real in bases else ()),
        on_volume=real.is_relative_to(root.path.resolve()),
    )


def _envs_dirs(environ: Mapping[str, str], home: Path) -> list[Path]:
    settings = conda_settings.conda_settings(environ, home)
    configured = settings.get("envs_dirs") or settings.get("envs_path") or []
    variable = environ.get("CONDA_ENVS_DIRS") or environ.get("CONDA_ENVS_PATH") or ""
    folders = [
        *variable.split(":"),
        *(configured if isinstance(configured, list) else []),
        environ.get("WORKON_HOME", ""),
    ]
    folders += [str(home / ".conda" / "envs"), str(home / ".virtualenvs")]
    return [Path(str(folder)).expanduser() for folder in folders if folder]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError:
        return []
