"""An environment: its interpreter from conda or the system, its packages from pip's locks, built beside its place."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core import layout
from provision.core.errors import FirstlightError, SpecError
from provision.core.progress import no_progress
from provision.core.python_source import PythonSource
from provision.core.step import Check, State
from provision.environments import installed_wheels, prefix, rehome_prefix, torch_fallback
from provision.environments.conda_packages import CondaInstaller
from provision.environments.package_sources import PackageSources
from provision.environments.pip_packages import PipInstaller
from provision.environments.torch_fallback import InstallRoute, InstallRoutes
from provision.environments.torch_sources import PinnedPackage
from provision.fs.atomic import write_atomic
from provision.fs.open_dir import OpenDir
from provision.installers import uv
from provision.lockfiles import requirements
from provision.volume import environment_marker
from provision.volume.environment_marker import MARKER_NAME, python_source, read_owner
from provision.volume.journal_acts import EnvironmentBuild

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from provision.config.torch import Variant
    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.environments.definition import EnvironmentDefinition
    from provision.volume.journal import Journal

SCHEMA = 2
# How long a source may take to say whether it has the build of torch: before an installation, and for a plan.
_ASK_SECONDS, _PLAN_SECONDS = 30.0, 4.0


class EnvStep:
    """The environment exists under the root and holds every package of its locks, unharmed."""

    essential = False
    local = True  # what is in the caches can be put back without the network

    def __init__(
        self,
        root: Root,
        wanted: EnvironmentDefinition,
        home: Path,
        journal: Journal,
        *,
        offline: bool,
        progress: Progress = no_progress,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take what is wanted, and the home whose conda settings are followed."""
        self.name = f"environment {wanted.name}"
        self.root = root
        self.wanted = wanted
        self.prefix = root.prefix(wanted.name)
        self.home = home
        self.journal = journal
        self.offline = offline
        self.tell = tell
        self.progress = progress
        self.supply = PackageSources(root, os.environ, home, journal, offline, progress)
        self.conda = CondaInstaller(
            wanted.locks,
            wanted.conda_lock,
            wanted.platform,
            wanted.python_source,
            self.prefix,
            root,
            self.supply,
            offline,
        )

    def describe(self) -> str:
        """The plan's line."""
        variant = self.wanted.variants[0]
        build = f" (torch {variant.torch})" if variant.torch else ""
        text = f"build {self.prefix} from {self.wanted.name}/{variant.name}.lock{build}, every hash checked"
        if variant.torch is None or self.offline:
            return text
        try:
            chain = self._routes(read_owner(self.prefix) or {}, self._python(), _PLAN_SECONDS)
            return text if chain.settled else f"{text}; {chain.announce(self.root)}"
        except FirstlightError as error:
            return f"{text}; {error}"

    def check(self, *, deep: bool = False) -> Check:
        """Look at the interpreter and at every file that the packages recorded; `deep` hashes them too."""
        if not self.prefix.exists() or not any(self.prefix.iterdir()):
            return Check(State.DRIFTED, f"{self.prefix} is not there yet")
        owner = read_owner(self.prefix)
        if owner is None:
            message = f"{self.prefix} was not made by firstlight. Look at it: ls -la {self.prefix}; move it away."
            return Check(State.BLOCKED, message)
        source = python_source(owner)
        if not self.wanted.python_source.accepts(source):
            message = (
                f"{self.prefix} has its python from {source}, and {self.wanted.interpreter} is wanted. "
                f"Run `{layout.program()} env remove {self.wanted.name}`, then setup."
            )
            return Check(State.BLOCKED, message)
        harm = self._harm(owner, deep=deep)
        if harm:
            return Check(State.DRIFTED, harm)
        return self._standing(owner, deep=deep)

    def apply(self) -> None:
        """Make or mend the environment; what the user added beyond the locks stays."""
        self._clear_unfinished()
        self.journal.record(EnvironmentBuild(self.prefix, self.wanted.variants[0].name))
        owner = read_owner(self.prefix)
        with self.supply.open(self.wanted.variants[0]):
            if owner is None:
                self._build()
            else:
                self._mend(owner)

    def _harm(self, owner: dict[str, object], *, deep: bool) -> str | None:
        """What is wrong with an environment that we made, or None."""
        variant = self._variant_of(owner)
        if variant is None:
            return f"holds the variant {owner.get('variant')}, this machine needs {self.wanted.variants[0].name}"
        if python_source(owner).is_conda:
            if owner.get("prefix") != str(self.prefix):
                return f"was made as {owner.get('prefix')}, its files must be told that it lies at {self.prefix}"
            harmed = prefix.harmed_conda_packages(self.prefix, self.conda.packages(), deep=deep, progress=self.progress)
            if harmed:
                return _first(harmed)
        version = prefix.python_version(layout.interpreter(self.prefix))
        if version is None or not self._fits(version, variant):
            return f"its python does not run ({layout.interpreter(self.prefix)})"
        site = environment_marker.site_packages(self.prefix, version)
        packages = self._pip_packages(variant, version, owner)
        harmed = installed_wheels.harmed_packages(site, packages, deep=deep, progress=self.progress)
        return _first(harmed) if harmed else None

    def _standing(self, owner: dict[str, object], *, deep: bool) -> Check:
        variant = self._variant_of(owner) or self.wanted.variants[0]
        version = prefix.python_version(layout.interpreter(self.prefix)) or ""
        count = len(self._pip_packages(variant, version, owner)) + len(self.conda.packages(owner))
        source = python_source(owner)
        build = f", torch {variant.torch} ({variant.name})" if variant.torch else ""
        how = "every byte verified" if deep else f"{count} packages as locked"
        fetched = self.supply.health.summary()
        detail = f"Python {version} from {source}{build}, {how}{f': {fetched}' if fetched else ''}"
        notes = [self.wanted.warning] if self.wanted.warning else []
        notes += self.supply.health.warnings()
        if variant.name != self.wanted.variants[0].name:
            wanted = self.wanted.variants[0]
            why = f" ({owner['passed']})" if owner.get("passed") else ""
            notes.append(f"torch {wanted.torch} could not be had{why}; in its place: {wanted.instead_cost}")
        if source.is_system and owner.get("reason"):
            notes.append(f"the system's python stands in for conda's ({owner['reason']})")
        if source.is_conda:
            notes += filter(None, [prefix.too_long_for_scripts(self.prefix), self.conda.far_cache()])
        return Check(State.OK, detail, "; ".join(notes) or None)

    def _build(self) -> None:
        """Build beside the place; only what is whole gets the name."""
        new = self.prefix.with_name(f".{self.prefix.name}.building-{uuid.uuid4().hex[:8]}")
        source, reason = self.conda.choose()
        owner: dict[str, object] = {"interpreter": source.value, "prefix": str(self.prefix), "reason": reason}
        chain = self._begin(owner, self._python(source), is_new=True)
        pip = self._pip(chain)
        try:
            if source.is_conda:
                self.conda.install(new)
                version = prefix.python_version(layout.interpreter(new))
                if version is None or not self._fits(version, self.wanted.variants[0]):
                    raise FirstlightError(
                        f"{self.wanted.conda_lock} holds python {version}, and the packages are locked for "
                        f"{', '.join(self._pythons(self.wanted.variants[0]))}. Lock it anew: "
                        f"{layout.program()} env lock {self.wanted.name}"
                    )
            else:
                version = self._venv(new, pip)
            variant = self._install(new, version, pip, owner, chain)
            rehome_prefix.rewrite(new, str(new), str(self.prefix))
            self._own(new, owner, variant)
            if self.prefix.exists():
                self.prefix.rmdir()  # it is empty, or it would not be built
            new.rename(self.prefix)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _mend(self, owner: dict[str, object]) -> None:
        python = layout.interpreter(self.prefix)
        found = prefix.python_version(python)
        chain = self._begin(owner, found or self._python(python_source(owner)), is_new=False)
        pip = self._pip(chain)
        if python_source(owner).is_conda:
            moved = owner.get("prefix") != str(self.prefix)
            packages = self.conda.packages()
            harmed = prefix.harmed_conda_packages(self.prefix, packages, deep=True)
            if moved or harmed:
                everything = [package.name for package in packages]
                self.conda.install(self.prefix, everything if moved else list(harmed))
            if moved:
                rehome_prefix.rewrite(self.prefix, str(owner.get("prefix")), str(self.prefix))
            version = prefix.python_version(python)
            if version is None:
                again = f"{layout.program()} env remove {self.wanted.name}"
                setup = layout.next_command("setup")
                raise FirstlightError(f"{python} still does not run. Run `{again}`, then `{setup}`.")
        else:
            whole = found is not None and self._fits(found, self.wanted.variants[0])
            version = found if found is not None and whole else self._venv(self.prefix, pip)
        owner = owner | {"prefix": str(self.prefix)}
        variant = self._install(self.prefix, version, pip, owner, chain)
        self._own(self.prefix, owner, variant)

    def _uv(self) -> uv.UvSources:
        return uv.for_uv(os.environ, self.root.cache / "uv", offline=self.offline, settings=self.supply.settings)

    def _pip(self, chain: InstallRoutes) -> PipInstaller:
        return PipInstaller(self.prefix, chain.uv, self.supply, self.offline)

    def _venv(self, where: Path, pip: PipInstaller) -> str:
        base, version = self._base_python()
        pip.venv(where, base)
        return version

    def _begin(self, owner: dict[str, object], version: str, *, is_new: bool) -> InstallRoutes:
        """Choose where torch comes from and say so, before anything is fetched."""
        chain = self._routes(owner, version, _ASK_SECONDS)
        if chain.uv.dropped:
            have = "have" if len(chain.uv.dropped) > 1 else "has"
            self.tell(f"{', '.join(chain.uv.dropped)} {have} no effect here: packages are locked by hash")
        self._ready(chain, is_new=is_new)
        return chain

    def _ready(self, chain: InstallRoutes, *, is_new: bool) -> None:
        """Announce the way that is taken, and check that it fits."""
        variant = chain.way.variant
        if not chain.is_settled and variant.torch is not None:
            self.tell(chain.announce(self.root))
        if is_new or variant.name != self.wanted.variants[0].name:
            if variant.install_bytes is not None:
                self.progress(0, variant.install_bytes)  # what the installers write, as far as nothing better is known
            cache = Path(chain.uv.environment["UV_CACHE_DIR"])
            torch_fallback.need_space(variant, self.name, self.root, cache)

    def _routes(self, owner: dict[str, object], version: str, seconds: float) -> InstallRoutes:
        def pins(variant: Variant) -> PinnedPackage | None:
            packages = self._pip_packages(variant, version, owner)
            torch = next((each for each in packages if each.name == "torch"), None)
            if torch is None:
                return None
            pinned = self.wanted.locks.hashes(variant.name)
            return PinnedPackage("torch", torch.version, pinned["torch"][1], version)

        return InstallRoutes(
            self.supply, self._uv(), self.wanted.variants, pins, seconds, self._settled(owner, version)
        )

    def _settled(self, owner: dict[str, object], version: str) -> Variant | None:
        """Return the variant that is there and whose torch nothing has happened to, or None."""
        variant = self._variant_of(owner)
        if variant is None:
            return None
        torch = [each for each in self._pip_packages(variant, version, owner) if each.name == "torch"]
        site = environment_marker.site_packages(self.prefix, version)
        return None if installed_wheels.harmed_packages(site, torch, deep=False) else variant

    def _python(self, source: PythonSource = PythonSource.AUTO) -> str:
        """Return the version of python that the environment will have."""
        return self.conda.python(source) or self._base_python()[1]

    def _base_python(self) -> tuple[Path, str]:
        advice = f"{uv.uv_binary()} python install {self.wanted.pythons[0]}"
        return prefix.find_python(self._pythons(self.wanted.variants[0]), uv.base_python(), advice)

    def _install(
        self, where: Path, version: str, pip: PipInstaller, owner: dict[str, object], chain: InstallRoutes
    ) -> Variant:
        """Install the wanted variant, else what stands in for it where its build of torch cannot be had."""

        def attempt(way: InstallRoute) -> None:
            packages = self._pip_packages(way.variant, version, owner)
            if packages:
                # What conda holds is not shown to uv: it would put pip's files over conda's.
                conda = {requirements.normal(each.name) for each in self.conda.packages(owner) if each.is_python}
                text = requirements.without(self.wanted.locks.text(way.variant.name), conda)
                pip.install(where, way, version, packages, text)

        variant = chain.follow(attempt, lambda: self._ready(chain, is_new=False), self.tell)
        if variant.name != self.wanted.variants[0].name and chain.passed:
            owner["passed"] = "; ".join(chain.passed)
        return variant

    def _pip_packages(
        self, variant: Variant, version: str, owner: dict[str, object]
    ) -> Sequence[requirements.LockedPackage]:
        """What the lock wants from pip; what conda's part already holds is conda's.

        Raises:
            SpecError: the two want different versions of one package.
        """
        lock = self.wanted.locks.pip_file(variant.name)
        if not lock.exists() and variant.torch is None:
            return []
        packages = self.wanted.locks.packages(variant.name, version)
        conda = {requirements.normal(each.name): each.version for each in self.conda.packages(owner) if each.is_python}
        for package in packages:
            if conda.get(package.name, package.version) != package.version:
                raise SpecError(
                    f"{lock} wants {package.name}=={package.version}, {self.wanted.conda_lock} holds "
                    f"{package.name} {conda[package.name]}: the one would overwrite the other. Lock them together: "
                    f"{layout.program()} env lock {self.wanted.name}"
                )
        return [package for package in packages if package.name not in conda]

    def _variant_of(self, owner: dict[str, object]) -> Variant | None:
        return next((known for known in self.wanted.variants if known.name == owner.get("variant")), None)

    def _pythons(self, variant: Variant) -> Sequence[str]:
        return variant.python or self.wanted.pythons

    def _fits(self, version: str, variant: Variant) -> bool:
        return version.rpartition(".")[0] in self._pythons(variant)

    def _clear_unfinished(self) -> None:
        """Take away what a killed run was building; it never had the name."""
        for left in self.prefix.parent.glob(f".{self.prefix.name}.building-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _own(self, where: Path, owner: dict[str, object], variant: Variant) -> None:
        with OpenDir.at(where) as folder:
            folder.sync_file_system()  # what is marked as whole must not lose files to a power loss
        wanted = owner | {"schema": SCHEMA, "env": self.wanted.name, "variant": variant.name}
        if read_owner(where) != wanted:
            write_atomic(where / MARKER_NAME, json.dumps(wanted, sort_keys=True) + "\n")


def _first(harmed: dict[str, str]) -> str:
    name, reason = next(iter(harmed.items()))
    return f"{name}: {reason}" + (f", and {len(harmed) - 1} more" if len(harmed) > 1 else "")
