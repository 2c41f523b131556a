"""The environments that are on this machine, ours and others', and what is wrong in them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provision import rattler
from provision.activation import conda_bases
from provision.environment import read_owner
from provision.prefix import conda_records, size_bytes
from provision.wheels import normal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.paths import Root


@dataclass(frozen=True)
class Found:
    """One environment; `mixed` says what pip put over conda's packages, `activatable` by what it is entered."""

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
        """As plain JSON types."""
        return asdict(self)


def environments(root: Root, home: Path, environ: Mapping[str, str]) -> list[Found]:
    """Every environment in the places where environments are kept; ours first.

    Args:
        root: the persistent folder.
        home: whose conda settings and folders are looked at.
        environ: for CONDA_*, VIRTUAL_ENV and WORKON_HOME.
    """
    bases = conda_bases(environ, home)
    folders = _children(root.prefix(""))
    for base in bases:
        folders += [base, *_children(base / "envs")]
    for parent in _envs_dirs(environ, home):
        folders += _children(parent)
    listed = home / ".conda" / "environments.txt"
    if listed.is_file():
        folders += [Path(line) for line in listed.read_text(encoding="utf-8", errors="replace").split("\n") if line]
    folders += [Path(environ[name]) for name in ("CONDA_PREFIX", "VIRTUAL_ENV") if environ.get(name)]
    found: dict[Path, Found] = {}
    for folder in folders:
        try:
            real = folder.resolve()
            if real not in found and ((real / "conda-meta").is_dir() or (real / "pyvenv.cfg").is_file()):
                found[real] = _look(folder, real, root, bases)
        except OSError:
            continue  # another user's
    return list(found.values())


def mixed(prefix: Path) -> list[str]:
    """What pip put over, or in place of, packages that conda manages in the same environment.

    A package of pip shadows conda's when both are installed under one name; it stands in for one when conda's
    packages depend on the name and conda itself does not hold it.
    """
    records = conda_records(prefix)
    held = {normal(name): record for name, record in records.items()}
    owned = {row["_path"]: row for record in records.values() for row in record.get("paths_data", {}).get("paths", [])}
    wanted = {
        normal(spec.split()[0]): name
        for name, record in records.items()
        for spec in record.get("depends", [])
        if not spec.startswith("__")
    }
    found = []
    for info in sorted(_dist_infos(prefix)):
        name, _, version = info.name.removesuffix(".dist-info").partition("-")
        name = normal(name)
        if _is_condas(info, prefix, owned):
            continue
        if name in held:
            found.append(f"{name} {version} of pip over conda's {held[name].get('version')}")
        elif name in wanted:
            found.append(f"{name} {version} of pip, which conda's {wanted[name]} depends on")
    return found


def _is_condas(info: Path, prefix: Path, owned: Mapping[str, Any]) -> bool:
    """Whether conda put this package here and nobody has put another over it."""
    relative = info.relative_to(prefix).as_posix()
    if f"{relative}/METADATA" not in owned:
        return False
    installer = owned.get(f"{relative}/INSTALLER")
    there = info / "INSTALLER"
    if installer is None:
        return not there.exists()
    expected = installer.get("sha256_in_prefix") or installer.get("sha256")
    return there.exists() and hashlib.sha256(there.read_bytes()).hexdigest() == expected


def _look(folder: Path, real: Path, root: Root, bases: list[Path]) -> Found:
    is_conda = (real / "conda-meta").is_dir()
    owner = read_owner(real) or {}
    infos = _dist_infos(real)
    torch = next((info.name.removesuffix(".dist-info") for info in infos if info.name.startswith("torch-")), None)
    variant = owner.get("variant") or (torch.replace("-", " ") if torch else None)
    records = conda_records(real) if is_conda else {}
    if is_conda:
        version = records.get("python", {}).get("version")
        by_name = any(real.parent == base / "envs" for base in bases) or ".conda" in folder.parts
        enter = f"conda activate {folder.name if by_name else real}" if bases else None
    else:
        config = (real / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^version(?:_info)?\s*=\s*(\S+)", config, re.MULTILINE)
        version = match.group(1) if match else None
        enter = f". {real}/bin/activate" if (real / "bin" / "activate").exists() else None
    return Found(
        name="base" if real in bases else folder.name,
        prefix=str(real),
        manager="conda" if is_conda else "venv",
        interpreter=f"Python {version}" if version else None,
        variant=str(variant) if variant else None,
        packages=len(records) + sum(normal(info.name.split("-")[0]) not in records for info in infos),
        mixed=tuple(mixed(real)) if is_conda else (),
        activatable=enter,
        # Other environments and the package cache lie inside conda's base.
        size_bytes=size_bytes(real, ("envs", "pkgs") if real in bases else ()),
        on_volume=real.is_relative_to(root.path.resolve()),
    )


def _envs_dirs(environ: Mapping[str, str], home: Path) -> list[Path]:
    settings = rattler.conda_settings(environ, home)
    listed = settings.get("envs_dirs") or settings.get("envs_path") or []
    named = environ.get("CONDA_ENVS_DIRS") or environ.get("CONDA_ENVS_PATH") or ""
    folders = [*named.split(":"), *(listed if isinstance(listed, list) else []), environ.get("WORKON_HOME", "")]
    folders += [str(home / ".conda" / "envs"), str(home / ".virtualenvs")]
    return [Path(str(folder)).expanduser() for folder in folders if folder]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError:
        return []


def _dist_infos(prefix: Path) -> list[Path]:
    return [*prefix.glob("lib/python3*/site-packages/*.dist-info"), *prefix.glob("Lib/site-packages/*.dist-info")]
