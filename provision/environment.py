"""An environment: its interpreter from conda or the system, its packages from pip's locks, built beside its place."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision import command, conda_lock, paths, prefix, rattler, sources, wheels
from provision.errors import BlockedError, FirstlightError, SpecError
from provision.pip_part import PipPart, torch_is_missing
from provision.step import Check, State
from provision.supply import Supply
from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from provision.conda_lock import CondaPackage
    from provision.journal import Journal
    from provision.paths import Root
    from provision.spec import Variant

SCHEMA = 2
_OWNER = ".firstlight.json"


@dataclass(frozen=True)
class Wanted:
    """What an environment is made of.

    `folder` holds its locks; `variants` is the wanted one first, then its stand-ins; `pythons` are the versions that
    the locks hold wheels for; `interpreter` is auto, conda or system; `platform` is conda's name of this machine;
    `reason` says why the variant, `warning` what its owner should know of it.
    """

    name: str
    folder: Path
    variants: Sequence[Variant]
    pythons: Sequence[str]
    interpreter: str
    platform: str | None
    reason: str
    warning: str | None = None

    @property
    def conda_lock(self) -> Path | None:
        """The lock of the conda part, where there is one."""
        lock = self.folder / "conda-lock.yml"
        return lock if lock.exists() else None


class EnvStep:
    """The environment exists under the root and holds every package of its locks, unharmed."""

    essential = False
    local = True  # what is in the caches can be put back without the network

    def __init__(
        self,
        root: Root,
        wanted: Wanted,
        home: Path,
        journal: Journal,
        *,
        offline: bool,
        progress: Callable[[int, int], None] = lambda _, __: None,
    ) -> None:
        """Take what is wanted, and the home whose conda settings are followed."""
        self.name = f"environment {wanted.name}"
        self.root = root
        self.wanted = wanted
        self.prefix = root.prefix(wanted.name)
        self.home = home
        self.journal = journal
        self.offline = offline
        self.supply = Supply(root, os.environ, home, journal, offline, progress)
        self._locked_conda: list[CondaPackage] | None = None

    def describe(self) -> str:
        """The plan's line."""
        variant = self.wanted.variants[0]
        build = f" (torch {variant.torch})" if variant.torch else ""
        return f"build {self.prefix} from {self.wanted.name}/{variant.name}.lock{build}, every hash checked"

    def check(self, *, deep: bool = False) -> Check:
        """Look at the interpreter and at every file that the packages recorded; `deep` hashes them too."""
        if not self.prefix.exists() or not any(self.prefix.iterdir()):
            return Check(State.DRIFTED, f"{self.prefix} is not there yet")
        owner = read_owner(self.prefix)
        if owner is None:
            message = f"{self.prefix} was not made by firstlight. Look at it: ls -la {self.prefix}; move it away."
            return Check(State.BLOCKED, message)
        kind = owner.get("interpreter", "system")
        if self.wanted.interpreter not in {"auto", kind}:
            message = (
                f"{self.prefix} has its python from {_FROM[str(kind)]}, and {self.wanted.interpreter} is wanted. "
                f"Run `{paths.program()} env remove {self.wanted.name}`, then setup."
            )
            return Check(State.BLOCKED, message)
        harm = self._harm(owner, deep=deep)
        if harm:
            return Check(State.DRIFTED, harm)
        return self._standing(owner, deep=deep)

    def apply(self) -> None:
        """Make or mend the environment; what the user added beyond the locks stays."""
        self._clear_unfinished()
        self.journal.record("environment", prefix=self.prefix, variant=self.wanted.variants[0].name)
        owner = read_owner(self.prefix)
        if owner is None:
            self._need_space()
        with self.supply.open(self.wanted.variants[0]):
            if owner is None:
                self._build()
            else:
                self._mend(owner)

    def lock_file(self, variant: Variant) -> Path:
        """The lock of one variant."""
        return self.wanted.folder / f"{variant.name}.lock"

    def _harm(self, owner: dict[str, object], *, deep: bool) -> str | None:
        """What is wrong with an environment that we made, or None."""
        variant = self._variant_of(owner)
        if variant is None:
            return f"holds the variant {owner.get('variant')}, this machine needs {self.wanted.variants[0].name}"
        if owner.get("interpreter") == "conda":
            if owner.get("prefix") != str(self.prefix):
                return f"was made as {owner.get('prefix')}, its files must be told that it lies at {self.prefix}"
            harmed = prefix.harmed_conda_packages(self.prefix, self._conda_packages(), deep=deep)
            if harmed:
                return _first(harmed)
        version = prefix.python_version(paths.interpreter(self.prefix))
        if version is None or not self._fits(version, variant):
            return f"its python does not run ({paths.interpreter(self.prefix)})"
        site = prefix.site_packages(self.prefix, version)
        harmed = wheels.harmed_packages(site, self._pip_packages(variant, version, owner), deep=deep)
        return _first(harmed) if harmed else None

    def _standing(self, owner: dict[str, object], *, deep: bool) -> Check:
        variant = self._variant_of(owner) or self.wanted.variants[0]
        version = prefix.python_version(paths.interpreter(self.prefix)) or ""
        count = len(self._pip_packages(variant, version, owner)) + len(self._conda_packages(owner))
        kind = str(owner.get("interpreter", "system"))
        build = f", torch {variant.torch} ({variant.name})" if variant.torch else ""
        how = "every byte verified" if deep else f"{count} packages as locked"
        fetched = self.supply.ledger.summary()
        detail = f"Python {version} from {_FROM[kind]}{build}, {how}{f': {fetched}' if fetched else ''}"
        notes = [self.wanted.warning] if self.wanted.warning else []
        notes += self.supply.ledger.loud()
        if variant.name != self.wanted.variants[0].name:
            wanted = self.wanted.variants[0]
            notes.append(f"torch {wanted.torch} could not be had: {wanted.instead_cost}")
        if kind == "system" and owner.get("reason"):
            notes.append(f"the system's python stands in for conda's ({owner['reason']})")
        if kind == "conda":
            notes += filter(None, [prefix.too_long_for_scripts(self.prefix), self._far_cache()])
        return Check(State.OK, detail, "; ".join(notes) or None)

    def _build(self) -> None:
        """Build beside the place; only what is whole gets the name."""
        new = self.prefix.with_name(f".{self.prefix.name}.building-{uuid.uuid4().hex[:8]}")
        kind, reason = self._choose_interpreter()
        try:
            if kind == "conda":
                with ThreadPoolExecutor(1) as pool:  # pip takes a quarter of a second to say its settings
                    asked = pool.submit(self._pip)
                    self._install_conda(new)
                pip = asked.result()
                version = prefix.python_version(paths.interpreter(new))
                if version is None or not self._fits(version, self.wanted.variants[0]):
                    raise FirstlightError(
                        f"{self.wanted.conda_lock} holds python {version}, and the packages are locked for "
                        f"{', '.join(self._pythons(self.wanted.variants[0]))}. Lock it anew: "
                        f"{paths.program()} env lock {self.wanted.name}"
                    )
            else:
                pip = self._pip()
                version = self._venv(new, pip)
            owner: dict[str, object] = {"interpreter": kind, "prefix": str(self.prefix), "reason": reason}
            variant = self._install_first(new, version, pip, owner)
            prefix.rewrite(new, str(new), str(self.prefix))
            self._own(new, owner, variant)
            if self.prefix.exists():
                self.prefix.rmdir()  # it is empty, or it would not be built
            new.rename(self.prefix)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _mend(self, owner: dict[str, object]) -> None:
        pip = self._pip()
        python = paths.interpreter(self.prefix)
        if owner.get("interpreter") == "conda":
            moved = owner.get("prefix") != str(self.prefix)
            packages = self._conda_packages()
            harmed = prefix.harmed_conda_packages(self.prefix, packages, deep=True)
            if moved or harmed:
                everything = [package.name for package in packages]
                self._install_conda(self.prefix, everything if moved else list(harmed))
            if moved:
                prefix.rewrite(self.prefix, str(owner.get("prefix")), str(self.prefix))
            version = prefix.python_version(python)
            if version is None:
                again = f"{paths.program()} env remove {self.wanted.name}"
                raise FirstlightError(f"{python} still does not run. Run `{again}`, then `make setup`.")
        else:
            found = prefix.python_version(python)
            whole = found is not None and self._fits(found, self.wanted.variants[0])
            version = found if found is not None and whole else self._venv(self.prefix, pip)
        owner = owner | {"prefix": str(self.prefix)}
        variant = self._install_first(self.prefix, version, pip, owner)
        self._own(self.prefix, owner, variant)

    def _choose_interpreter(self) -> tuple[str, str | None]:
        """Conda or system; and why the system's stands in where conda's was meant."""
        wanted, lock = self.wanted.interpreter, self.wanted.conda_lock
        if wanted == "system" or (wanted == "auto" and lock is None):
            return "system", None
        if lock is None:
            raise SpecError(f"{self.wanted.folder} has no conda-lock.yml, so its python cannot come from conda.")
        reason = self._no_conda(lock)
        if reason is None:
            return "conda", None
        if wanted == "conda":
            raise BlockedError(
                f"python cannot be had from conda: {reason}. Name a mirror (channel_alias in ~/.condarc, or "
                'CONDA_CHANNEL_ALIAS), or take the system\'s python: interpreter = "system" in host.toml.'
            )
        return "system", reason

    def _no_conda(self, lock: Path) -> str | None:
        """Why the conda part cannot be installed here and now, or None."""
        if self.wanted.platform is None:
            return "conda has no name for this platform"
        try:
            packages = conda_lock.read_lock(lock, self.wanted.platform)
        except SpecError as error:
            if self.wanted.platform in {each.platform for each in conda_lock.read_lock(lock)}:
                raise
            return str(error).rstrip(".")
        absent = rattler.not_cached(packages, self.root.pkgs)
        if absent and self.offline:
            return f"offline, and {len(absent)} of {len(packages)} conda packages are not in {self.root.pkgs}"
        return self.supply.unreachable(absent)

    def _install_conda(self, where: Path, reinstall: Sequence[str] = ()) -> None:
        lock, platform = self.wanted.conda_lock, self.wanted.platform
        if lock is None or platform is None:
            raise SpecError(f"{self.wanted.folder} has no conda-lock.yml for this platform. Restore it.")
        mirrored = self.supply.for_conda(self._conda_packages())
        if self.offline and (absent := rattler.not_cached(self._conda_packages(), self.root.pkgs)):
            raise BlockedError(
                f"offline, and {absent[0].name} is not in {self.root.pkgs}. Run again without --offline."
            )
        asked = self.wanted.folder / "environment.yml"
        specs = [spec for spec, _ in conda_lock.read_environment(asked).conda] if asked.exists() else []
        rattler.install(
            lock,
            platform,
            where,
            self.root.pkgs,
            mirrored,
            final=self.prefix,
            specs=specs,
            reinstall=reinstall,
            kept=set(prefix.conda_records(where)) - {each.name for each in self._conda_packages()},
            full=bool(reinstall),
        )

    def _pip(self) -> PipPart:
        cache = self.root.cache / "uv"
        uv = sources.for_uv(os.environ, cache, offline=self.offline, settings=self.supply.settings)
        return PipPart(self.prefix, uv, self.supply, self.offline, self.wanted.variants[0].install_bytes)

    def _venv(self, where: Path, pip: PipPart) -> str:
        advice = f"{sources.uv_binary()} python install {self.wanted.pythons[0]}"
        base, version = prefix.find_python(self._pythons(self.wanted.variants[0]), sources.base_python(), advice)
        pip.venv(where, base)
        return version

    def _install_first(self, where: Path, version: str, pip: PipPart, owner: dict[str, object]) -> Variant:
        """Install the wanted variant, else what stands in for it where its build of torch cannot be had."""
        wanted, *instead = self.wanted.variants
        try:
            self._install(where, wanted, version, pip, owner)
        except command.CommandError as error:
            if not instead or not torch_is_missing(wanted, error):
                raise
            self._install(where, instead[0], version, pip, owner)
            return instead[0]
        return wanted

    def _install(self, where: Path, variant: Variant, version: str, pip: PipPart, owner: dict[str, object]) -> None:
        packages = self._pip_packages(variant, version, owner)
        if packages:
            # What conda holds is not shown to uv: it would put pip's files over conda's.
            conda = {wheels.normal(each.name) for each in self._conda_packages(owner) if each.is_python}
            pip.install(where, variant, version, packages, wheels.without(self.lock_file(variant), conda))

    def _conda_packages(self, owner: dict[str, object] | None = None) -> list[CondaPackage]:
        lock = self.wanted.conda_lock
        if lock is None or (owner is not None and owner.get("interpreter") != "conda"):
            return []
        if self._locked_conda is None:
            self._locked_conda = conda_lock.read_lock(lock, self.wanted.platform)
        return self._locked_conda

    def _pip_packages(self, variant: Variant, version: str, owner: dict[str, object]) -> list[wheels.Locked]:
        """What the lock wants from pip; what conda's part already holds is conda's.

        Raises:
            SpecError: the two want different versions of one package.
        """
        lock = self.lock_file(variant)
        if not lock.exists() and variant.torch is None:
            return []
        packages = wheels.read_lock(lock, version)
        conda = {wheels.normal(each.name): each.version for each in self._conda_packages(owner) if each.is_python}
        for package in packages:
            if conda.get(package.name, package.version) != package.version:
                raise SpecError(
                    f"{lock} wants {package.name}=={package.version}, {self.wanted.conda_lock} holds "
                    f"{package.name} {conda[package.name]}: the one would overwrite the other. Lock them together: "
                    f"{paths.program()} env lock {self.wanted.name}"
                )
        return [package for package in packages if package.name not in conda]

    def _variant_of(self, owner: dict[str, object]) -> Variant | None:
        return next((known for known in self.wanted.variants if known.name == owner.get("variant")), None)

    def _pythons(self, variant: Variant) -> Sequence[str]:
        return variant.python or self.wanted.pythons

    def _fits(self, version: str, variant: Variant) -> bool:
        return version.rpartition(".")[0] in self._pythons(variant)

    def _need_space(self) -> None:
        needed = self.wanted.variants[0].install_bytes
        if needed is None:
            return
        self.root.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root.path).free
        if free < needed:
            raise BlockedError(
                f"{self.root.path}: {free:,} bytes are free, about {needed:,} are needed for {self.name}. "
                "Free some, or give another --root, then run again."
            )

    def _far_cache(self) -> str | None:
        if not self.root.pkgs.exists() or self.root.pkgs.stat().st_dev == self.prefix.stat().st_dev:
            return None
        return f"{self.root.pkgs} lies on another file system than {self.prefix}: its files were copied, not linked"

    def _clear_unfinished(self) -> None:
        """Take away what a killed run was building; it never had the name."""
        for left in self.prefix.parent.glob(f".{self.prefix.name}.building-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _own(self, where: Path, owner: dict[str, object], variant: Variant) -> None:
        wanted = owner | {"schema": SCHEMA, "env": self.wanted.name, "variant": variant.name}
        if read_owner(where) != wanted:
            write_atomic(where / _OWNER, json.dumps(wanted, sort_keys=True) + "\n")


_FROM = {"conda": "conda", "system": "the system"}


def read_owner(where: Path) -> dict[str, object] | None:
    """What firstlight wrote into an environment that it made, or None."""
    try:
        owner = json.loads((where / _OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _first(harmed: dict[str, str]) -> str:
    name, reason = next(iter(harmed.items()))
    return f"{name}: {reason}" + (f", and {len(harmed) - 1} more" if len(harmed) > 1 else "")
