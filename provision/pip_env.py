"""Builds an environment from its hash-locked requirements, and proves that it still is what the lock says."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import sys
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision import command, paths, sources
from provision.errors import BlockedError, FirstlightError
from provision.step import Check, State
from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from provision.journal import Journal
    from provision.paths import Root
    from provision.spec import Variant

SCHEMA = 1
_OWNER = ".firstlight.json"
_VERSION = "import sys; print('%d.%d.%d' % sys.version_info[:3])"


@dataclass(frozen=True)
class Locked:
    """One pinned package of a lock."""

    name: str
    version: str


class PipEnvStep:
    """The environment exists under the root and holds every package of its lock, unharmed."""

    essential = False
    local = False

    def __init__(
        self,
        root: Root,
        env: str,
        env_folder: Path,
        variants: Sequence[Variant],
        pythons: Sequence[str],
        journal: Journal,
        *,
        offline: bool,
    ) -> None:
        """Take the environment's name, its data folder, and its variants: the wanted one first, then its stand-ins."""
        self.name = f"environment {env}"
        self.env = env
        self.root = root
        self.prefix = root.prefix(env)
        self.env_folder = env_folder
        self.variants = variants
        self.pythons = pythons
        self.journal = journal
        self.offline = offline

    def describe(self) -> str:
        """The plan's line."""
        variant = self.variants[0]
        return f"build {self.prefix} from {self.env}/{variant.name}.lock (torch {variant.torch}), every hash checked"

    def check(self, *, deep: bool = False) -> Check:
        """Look at the interpreter and at every file that the packages recorded; `deep` hashes them too."""
        if not self.prefix.exists() or not any(self.prefix.iterdir()):
            return Check(State.DRIFTED, f"{self.prefix} is not there yet")
        owner = self._owner()
        if owner is None:
            message = f"{self.prefix} was not made by firstlight. Look at it: ls -la {self.prefix}; move it away."
            return Check(State.BLOCKED, message)
        variant = next((known for known in self.variants if known.name == owner.get("variant")), None)
        if variant is None:
            wanted = self.variants[0].name
            return Check(State.DRIFTED, f"holds the variant {owner.get('variant')}, this machine needs {wanted}")
        version = python_version(paths.interpreter(self.prefix))
        if version is None or version.rpartition(".")[0] not in self.pythons:
            return Check(State.DRIFTED, f"its python does not run ({paths.interpreter(self.prefix)})")
        wanted_packages = read_lock(self.lock_file(variant), version)
        harmed = harmed_packages(self.site(version), wanted_packages, deep=deep)
        if harmed:
            name, reason = next(iter(harmed.items()))
            more = f", and {len(harmed) - 1} more" if len(harmed) > 1 else ""
            return Check(State.DRIFTED, f"{name}: {reason}{more}")
        how = "every byte verified" if deep else f"{len(wanted_packages)} packages as locked"
        detail = f"Python {version}, torch {variant.torch} ({variant.name}), {how}"
        fallback = None
        if variant.name != self.variants[0].name:
            cost = self.variants[0].instead_cost
            fallback = f"torch {self.variants[0].torch} could not be had: {cost}"
        return Check(State.OK, detail, fallback)

    def apply(self) -> None:
        """Make or mend the environment; what the user added beyond the lock stays."""
        self._need_space()
        owner = self._owner() or {}
        self.journal.record("environment", prefix=self.prefix, variant=self.variants[0].name)
        self.prefix.mkdir(parents=True, exist_ok=True)
        self._own(str(owner.get("variant", self.variants[0].name)))
        uv = sources.for_uv(os.environ, self.root.cache / "uv", offline=self.offline)
        python = paths.interpreter(self.prefix)
        version = python_version(python)
        if version is None or version.rpartition(".")[0] not in self.pythons:
            base, version = find_python(self.pythons)
            self._uv(["venv", "--quiet", "--allow-existing", "--python", base, self.prefix], uv)
        self._own(self._install_first(version, uv).name)

    def _install_first(self, version: str, uv: sources.UvSources) -> Variant:
        """Install the wanted variant, else what stands in for it where its build of torch cannot be had."""
        wanted, *instead = self.variants
        try:
            self._install(wanted, version, uv)
        except command.CommandError as error:
            if not instead or self.offline or not _torch_is_missing(wanted, error):
                raise
            self._install(instead[0], version, uv)
            return instead[0]
        return wanted

    def lock_file(self, variant: Variant) -> Path:
        """The lock of one variant."""
        return self.env_folder / f"{variant.name}.lock"

    def site(self, version: str) -> Path:
        """The environment's site-packages."""
        if sys.platform == "win32":
            return self.prefix / "Lib" / "site-packages"
        return self.prefix / "lib" / f"python{version.rpartition('.')[0]}" / "site-packages"

    def _install(self, variant: Variant, version: str, uv: sources.UvSources) -> None:
        lock = self.lock_file(variant)
        harmed = harmed_packages(self.site(version), read_lock(lock, version), deep=True)
        install: list[str | Path] = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", lock]
        install += [*uv.flags, "--python", paths.interpreter(self.prefix)]
        # uv trusts a .dist-info folder: a package whose files are harmed has to be named.
        for name in harmed:
            install += ["--reinstall-package", name]
        try:
            self._uv(install, uv)
        except command.CommandError as error:
            if variant.find_links is None or not _torch_is_missing(variant, error):
                raise
            # The wheel's hash is pinned, so the page that lists it needs no trust.
            links = ",".join(filter(None, [uv.environment.get("UV_FIND_LINKS"), variant.find_links]))
            self._uv(install, sources.UvSources(uv.environment | {"UV_FIND_LINKS": links}, uv.flags))

    def _uv(self, arguments: Sequence[str | Path], uv: sources.UvSources) -> None:
        try:
            command.run([sources.uv_binary(), *arguments], env=uv.environment)
        except command.CommandError as error:
            if re.search(r"os error 28|No space left|os error 122", str(error)):
                needed = self.variants[0].install_bytes
                wanted = f" (about {needed:,} bytes are needed)" if needed else ""
                raise BlockedError(
                    f"{self.prefix}: no space left{wanted}. Free some, or give another --root, then run again."
                ) from error
            raise

    def _need_space(self) -> None:
        needed = self.variants[0].install_bytes
        if needed is None or (self.prefix / "pyvenv.cfg").exists():
            return
        self.root.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root.path).free
        if free < needed:
            raise BlockedError(
                f"{self.root.path}: {free:,} bytes are free, about {needed:,} are needed for {self.name}. "
                "Free some, or give another --root, then run again."
            )

    def _owner(self) -> dict[str, object] | None:
        try:
            owner = json.loads((self.prefix / _OWNER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None

    def _own(self, variant: str) -> None:
        wanted = {"schema": SCHEMA, "env": self.env, "variant": variant}
        if self._owner() != wanted:
            write_atomic(self.prefix / _OWNER, json.dumps(wanted) + "\n")


def python_version(python: Path) -> str | None:
    """What an interpreter says of itself (such as "3.11.7"), or None when it does not run."""
    try:
        return command.run([python, "-I", "-S", "-c", _VERSION], timeout_seconds=20).stdout.strip() or None
    except command.CommandError:
        return None


def find_python(supported: Sequence[str]) -> tuple[Path, str]:
    """An interpreter of this machine that the locks hold wheels for, the first supported version preferred.

    Raises:
        BlockedError: there is none.
    """
    seen = []
    for minor in supported:
        for name in (str(sources.base_python()), f"python{minor}", "python3"):
            found = shutil.which(name)
            version = python_version(Path(found)) if found else None
            if found and version and version.rpartition(".")[0] == minor:
                real = command.run([found, "-c", "import os, sys; print(os.path.realpath(sys._base_executable))"])
                return Path(real.stdout.strip()), version
            if version:
                seen.append(version)
    have = ", ".join(sorted(set(seen))) or "none"
    raise BlockedError(
        f"no python of version {', '.join(supported)} is here (found: {have}), and the environment's packages are "
        f"locked for these. Install one (such as: {sources.uv_binary()} python install {supported[0]}), "
        "then run again."
    )


def read_lock(lock: Path, python: str) -> list[Locked]:
    """The packages that a lock pins for this system and the given Python version.

    Raises:
        FirstlightError: the lock is not there, or a line is no pinned requirement.
    """
    from packaging.markers import default_environment
    from packaging.requirements import InvalidRequirement, Requirement

    environment: dict[str, str] = dict(default_environment())  # type: ignore[arg-type]  # a TypedDict of str
    environment |= {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    packages = []
    try:
        lines = lock.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FirstlightError(f"{lock} cannot be read: {error.strerror}. Restore it: git checkout -- {lock}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(("#", " ", "\t")):
            continue
        try:
            requirement = Requirement(line.rstrip("\\ "))
        except InvalidRequirement as error:
            raise FirstlightError(f"{lock}, line {number}: {error}. Restore it: git checkout -- {lock}") from error
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = str(requirement.specifier).removeprefix("==")
            packages.append(Locked(_normal(requirement.name), version))
    return packages


def harmed_packages(site: Path, wanted: Sequence[Locked], *, deep: bool) -> dict[str, str]:
    """{name: reason} of the locked packages that are absent, of another version, or not as recorded.

    Args:
        site: a site-packages folder.
        wanted: what the lock pins.
        deep: hash every file against its RECORD, not only its size.
    """
    there = {}
    for folder in site.glob("*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").partition("-")
        there[_normal(name)] = (version, folder)
    harmed = {}
    intact: list[tuple[str, Path]] = []
    for package in wanted:
        if package.name not in there:
            harmed[package.name] = "is not installed"
        elif there[package.name][0] != package.version:
            harmed[package.name] = f"is {there[package.name][0]}, the lock wants {package.version}"
        else:
            intact.append((package.name, there[package.name][1]))
    folders = [folder for _, folder in intact]
    # Hashing leaves Python's lock to the other threads; 20,000 calls of stat do not, and are quicker in one.
    reasons = _hash_records(folders) if deep else [_stat_record(folder) for folder in folders]
    return harmed | {name: reason for (name, _), reason in zip(intact, reasons, strict=True) if reason}


def _hash_records(folders: Sequence[Path]) -> list[str | None]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(_hash_record, folders))


def _stat_record(info: Path) -> str | None:
    """The first recorded file that is missing or has another size."""
    site = f"{info.parent}{os.sep}"
    for path, _, size in _record(info):
        try:
            found = os.stat(site + path).st_size  # noqa: PTH116 (20,000 files in a tenth of a second)
        except OSError:
            return f"{path} is missing"
        if size and int(size) != found:
            return f"{path} is {found} bytes, recorded with {size}"
    return None if (info / "RECORD").exists() else "its RECORD is missing"


def _hash_record(info: Path) -> str | None:
    """The first recorded file whose content is not the recorded one."""
    reason = _stat_record(info)
    if reason:
        return reason
    for path, digest, _ in _record(info):
        algorithm, _, expected = digest.partition("=")
        if algorithm != "sha256":
            continue
        with (info.parent / path).open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
        if urlsafe_b64encode(found.digest()).rstrip(b"=").decode() != expected:
            return f"{path} does not have its recorded content"
    return None


def _record(info: Path) -> list[tuple[str, str, str]]:
    """(path, digest, size) of every file that a package recorded, its compiled bytecode left out."""
    try:
        text = (info / "RECORD").read_text(encoding="utf-8")
    except OSError:
        return []
    # Nearly every line is three plain fields; only a path with a comma in it is quoted.
    rows = text.splitlines() if '"' not in text else csv.reader(text.splitlines())
    fields = [row.split(",") if isinstance(row, str) else row for row in rows]
    return [(row[0], row[1], row[2]) for row in fields if len(row) == 3 and not row[0].endswith(".pyc")]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _torch_is_missing(variant: Variant, error: command.CommandError) -> bool:
    """Whether uv failed because no source offers this build of torch, or its page did not answer."""
    text = str(error)
    return f"torch=={variant.torch}" in text or bool(variant.find_links and variant.find_links in text)
