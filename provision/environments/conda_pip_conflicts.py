"""Finds packages that both conda and pip have installed into one environment."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from provision.environments.prefix import conda_records
from provision.lockfiles.requirements import normal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


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
    for info in sorted(dist_infos(prefix)):
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


def dist_infos(prefix: Path) -> list[Path]:
    """Return the .dist-info folders of an environment."""
    return [*prefix.glob("lib/python3*/site-packages/*.dist-info"), *prefix.glob("Lib/site-packages/*.dist-info")]
