"""Finds packages that both conda and pip have installed into one environment."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from provision.environments.prefix import conda_records
from provision.lockfiles.requirements import normal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def conflicts(prefix: Path) -> list[str]:
    """Return a message for each package from pip that conflicts with conda's packages.

    Such a package replaces the package of the same name that conda installed. Or a conda package depends on it although
    conda itself has not installed it.
    """
    records = conda_records(prefix)
    installed = {normal(name): record for name, record in records.items()}
    files = {row["_path"]: row for record in records.values() for row in record.get("paths_data", {}).get("paths", [])}
    dependents = {
        normal(spec.split()[0]): name
        for name, record in records.items()
        for spec in record.get("depends", [])
        if not spec.startswith("__")  # a virtual package, such as __glibc
    }
    texts = []
    for info in sorted(dist_infos(prefix)):
        name, _, version = info.name.removesuffix(".dist-info").partition("-")
        name = normal(name)
        if _is_from_conda(info, prefix, files):
            continue
        if name in installed:
            texts.append(f"{name} {version} from pip replaces {installed[name].get('version')} from conda")
        elif name in dependents:
            texts.append(f"{name} {version} from pip, but conda's {dependents[name]} depends on it")
    return texts


def _is_from_conda(info: Path, prefix: Path, files: Mapping[str, Any]) -> bool:
    """Return whether conda installed this package and pip has not replaced it.

    Args:
        info: the .dist-info folder of the package.
        prefix: the environment.
        files: {path: conda's record} of the files that conda installed.
    """
    relative = info.relative_to(prefix).as_posix()
    if f"{relative}/METADATA" not in files:
        return False
    record = files.get(f"{relative}/INSTALLER")
    installer = info / "INSTALLER"
    if record is None:
        return not installer.exists()
    digest = record.get("sha256_in_prefix") or record.get("sha256")
    return installer.exists() and hashlib.sha256(installer.read_bytes()).hexdigest() == digest


def dist_infos(prefix: Path) -> list[Path]:
    """Return the .dist-info folders of an environment."""
    return [*prefix.glob("lib/python3*/site-packages/*.dist-info"), *prefix.glob("Lib/site-packages/*.dist-info")]
