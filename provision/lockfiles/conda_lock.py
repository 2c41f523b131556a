"""Reads `environment.yml`, which a person writes, and reads and writes lock files `conda-lock.yml` of version 1."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from provision.core import yaml_text
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PLATFORMS = ("linux-64", "linux-aarch64", "osx-64", "osx-arm64", "win-64")
_SUBDIRS = {
    ("linux", "x86_64"): "linux-64",
    ("linux", "aarch64"): "linux-aarch64",
    ("darwin", "x86_64"): "osx-64",
    ("darwin", "arm64"): "osx-arm64",
    ("windows", "amd64"): "win-64",
}
_HEADER = "# Written by `provision env lock`: every package by its hashes, at its channel's own address. Do not edit.\n"


@dataclass(frozen=True)
class CondaPackage:
    """Describe one locked conda package of one platform.

    `platform`: conda's name of the platform, such as "linux-64".
    `url`: its URL on the official channel, even if it is downloaded from a mirror.
    `dependencies`: {name of a package: required version, such as ">=1.2", or "*"}.
    `size`: in bytes. `timestamp`: the build time in seconds since 1970. A lock file does not store these two; they are
        known only for a package that was just solved.
    """

    name: str
    version: str
    platform: str
    url: str
    md5: str
    sha256: str
    dependencies: dict[str, str] = field(default_factory=dict)
    size: int | None = field(default=None, compare=False)
    timestamp: float | None = field(default=None, compare=False)

    @property
    def is_python(self) -> bool:
        """Return whether the package depends on Python, so that pip lists it as installed."""
        return "python" in self.dependencies


@dataclass(frozen=True)
class Environment:
    """Hold the content of environment.yml.

    `channels`: the names or URLs of the channels. `platforms`: conda's names of the platforms; empty if none is named.
    `conda`, `pip`: (requirement, line number) of each dependency.
    """

    channels: tuple[str, ...]
    conda: tuple[tuple[str, int], ...]
    pip: tuple[tuple[str, int], ...] = ()
    platforms: tuple[str, ...] = ()


def subdir(system: str, machine: str) -> str | None:
    """Return conda's name for a platform, such as "linux-64"; None for an unknown platform.

    Args:
        system: the value of `platform.system()` in lower case.
        machine: the value of `platform.machine()`.
    """
    return _SUBDIRS.get((system, machine.lower()))


def read_lock(path: Path, platform: str | None = None) -> list[CondaPackage]:
    """Return the packages in a lock file.

    Args:
        path: the path of the lock file.
        platform: conda's name of the platform whose packages are returned; None: of all platforms.

    Raises:
        SpecError: the file cannot be read, is not a lock file of version 1, or has no package of the platform.
    """
    text, data = _load(path)
    remedy = f"Restore it: git checkout -- {path}"
    if not isinstance(data, dict) or data.get("version") != 1 or not isinstance(data.get("package"), list):
        raise SpecError(f"{path} is not a conda-lock file of version 1. {remedy}")
    packages = []
    for row in data["package"]:
        package = _package(row)
        if package is None:
            line = row.lc.line + 1 if hasattr(row, "lc") else _line_of(text, str(row))
            raise SpecError(
                f"{path}, line {line}: not a pinned conda package with name, version, url, md5 and sha256. {remedy}"
            )
        packages.append(package)
    return list(of_platform(path, packages, platform))


def of_platform(path: Path, packages: Sequence[CondaPackage], platform: str | None) -> Sequence[CondaPackage]:
    """Return the packages of a lock file that are for one platform.

    Args:
        path: the path of the lock file, for the message.
        packages: the packages of all platforms in the lock file.
        platform: conda's name of the platform, such as "linux-64"; None: return all packages.

    Raises:
        SpecError: the lock file has no package of the platform.
    """
    if platform is None:
        return packages
    names = sorted({package.platform for package in packages})
    if platform not in names:
        raise SpecError(f"{path} is not locked for {platform}; it is for: {', '.join(names) or 'nothing'}.")
    return [package for package in packages if package.platform == platform]


def lock_text(packages: Sequence[CondaPackage], channels: Sequence[str], sources: Sequence[str]) -> str:
    """Return the text of a lock file of version 1, which conda-lock 4 can read.

    Args:
        packages: the packages of every platform.
        channels: the names or URLs of the channels, the preferred channel first.
        sources: the paths of the files from which the packages were solved, relative to the lock file.
    """
    rows = sorted(packages, key=lambda package: (package.name, package.platform))
    lines = [_HEADER.rstrip(), "version: 1", "metadata:", "  content_hash: {}", "  channels:"]
    for channel in channels:
        lines += [f"  - url: {_quoted(channel)}", "    used_env_vars: []"]
    lines += ["  platforms:", *(f"  - {platform}" for platform in sorted({row.platform for row in rows}))]
    lines += ["  sources:", *(f"  - {source}" for source in sources), "package:"]
    for row in rows:
        lines += [f"- name: {_quoted(row.name)}", f"  version: {_quoted(row.version)}", "  manager: conda"]
        lines += [f"  platform: {row.platform}"]
        named = sorted((name, spec) for name, spec in row.dependencies.items() if not name.startswith("__"))
        lines += ["  dependencies:" if named else "  dependencies: {}"]
        lines += [f"    {_quoted(name)}: {_quoted(spec)}" for name, spec in named]
        lines += [f"  url: {row.url}", "  hash:", f"    md5: {_quoted(row.md5)}", f"    sha256: {_quoted(row.sha256)}"]
        lines += ["  category: main", "  optional: false"]
    return "\n".join(lines) + "\n"


def read_environment(path: Path) -> Environment:
    """Return the content of an environment.yml.

    Raises:
        SpecError: the file cannot be read, has an invalid entry, or requires the same package from conda and pip.
    """
    _, data = _load(path)
    if not isinstance(data, dict) or not isinstance(data.get("dependencies"), list):
        raise SpecError(f"{path} has no list `dependencies:`. Add one.")
    return _environment(path, data)


def _environment(path: Path, data: Any) -> Environment:  # noqa: ANN401 (ruamel's own mapping, with line numbers)
    for key in ("channels", "platforms"):
        if not isinstance(data.get(key) or [], list):
            raise SpecError(f"{path}: {key} is not a list.")
    unknown = sorted(set(data) - {"name", "channels", "dependencies", "prefix", "platforms", "category"}, key=str)
    if unknown:
        raise SpecError(f"{path}, line {data.lc.key(unknown[0])[0] + 1}: unknown key {unknown[0]}.")
    conda, pip = [], []
    for number, entry in enumerate(data["dependencies"]):
        line = data["dependencies"].lc.item(number)[0] + 1
        if isinstance(entry, str):
            conda.append((entry, line))
        elif isinstance(entry, dict) and set(entry) == {"pip"} and isinstance(entry["pip"], list):
            section: Any = entry["pip"]
            pip += [(str(spec), section.lc.item(index)[0] + 1) for index, spec in enumerate(section)]
        else:
            raise SpecError(f"{path}, line {line}: a dependency must be a text, or a list under pip:.")
    lines = {package_name(spec): (spec, line) for spec, line in conda}
    for spec, line in pip:
        if package_name(spec) in lines:
            other, first = lines[package_name(spec)]
            raise SpecError(
                f"{path}: line {first} requires {other} from conda, line {line} requires {spec} from pip: one package "
                "would overwrite the other. Keep one of the two lines."
            )
    channels = tuple(str(channel) for channel in data.get("channels") or ["conda-forge"])
    platforms = tuple(str(platform) for platform in data.get("platforms") or [])
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown:
        raise SpecError(f"{path}: unknown platform {unknown[0]}; available: {', '.join(PLATFORMS)}.")
    return Environment(channels, tuple(conda), tuple(pip), platforms)


def package_name(spec: str) -> str:
    """Return the normalized package name in a requirement: "some-package" for `conda-forge::Some_Package>=1`.

    It is "" if the requirement has no valid name.
    """
    name = re.match(r"\s*([A-Za-z0-9._-]*[A-Za-z0-9])", spec.rpartition("::")[2])
    return re.sub(r"[-_.]+", "-", name.group(1)).lower() if name else ""


def _package(row: Any) -> CondaPackage | None:  # noqa: ANN401 (any value that YAML can hold)
    if not isinstance(row, dict) or row.get("manager") != "conda":
        return None
    pins = row.get("hash")
    name, version, platform, url = (row.get(key) for key in ("name", "version", "platform", "url"))
    texts = all(isinstance(value, str) and value for value in (name, version, platform, url))
    if not isinstance(pins, dict) or not texts:
        return None
    md5, sha256 = str(pins.get("md5")), str(pins.get("sha256"))
    if not re.fullmatch(r"[0-9a-f]{32}", md5) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        return None
    dependencies = row.get("dependencies") or {}
    if not isinstance(dependencies, dict):
        return None
    named = {str(name): str(spec) for name, spec in dependencies.items()}
    return CondaPackage(str(name), str(version), str(platform), str(url), md5, sha256, named)


def _load(path: Path) -> tuple[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, yaml_text.load(text, round_trip=True)
    except FileNotFoundError:
        raise SpecError(f"{path} does not exist.") from None
    except ValueError as error:
        raise SpecError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}.") from None


def _line_of(text: str, word: str) -> int:
    return next((number for number, line in enumerate(text.splitlines(), start=1) if word in line), 1)


def _quoted(text: str) -> str:
    """Return a text as a quoted YAML string, because YAML reads 3.11 without quotes as a number."""
    return "'" + text.replace("'", "''") + "'"
