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
    """Return a text for each package that pip has installed in conflict with conda.

    There are two kinds of conflict: conda has installed a package with the same name, and pip has replaced it. Or a
    package from conda depends on the package, but conda has not installed it.

    Args:
        prefix: the folder of the environment.
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
    """Return whether conda has installed a package and pip has not replaced it.

    Args:
        info: the .dist-info folder of the package.
        prefix: the folder of the environment.
        files: {path in the prefix: row of conda's record} of the files that conda has installed.
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
    """Return the .dist-info folders in an environment, one for each installed Python package."""
    return [*prefix.glob("lib/python3*/site-packages/*.dist-info"), *prefix.glob("Lib/site-packages/*.dist-info")]
