"""Defines the setup step that builds an environment from its lock files, or repairs it."""

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
from provision.environments import installed_wheels, package_caches, prefix, rehome_prefix, torch_fallback
from provision.environments.conda_packages import CondaInstaller
from provision.environments.package_sources import PackageSources
from provision.environments.pip_packages import PipInstaller
from provision.environments.torch_fallback import InstallRoute, InstallRoutes
from provision.environments.torch_sources import PinnedPackage
from provision.fs.atomic import write_atomic
from provision.fs.open_dir import OpenDir
from provision.installers import uv
from provision.lockfiles import requirements
from provision.volume import environment_marker, volume_capabilities
from provision.volume.environment_marker import MARKER_NAME, python_source, read_owner
from provision.volume.journal_acts import EnvironmentBuild

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from provision.config.torch import Variant
    from provision.core.layout import Root
    from provision.core.progress import Progress
    from provision.environments.definition import EnvironmentDefinition
    from provision.lockfiles.conda_lock import CondaPackage
    from provision.volume.journal import Journal

SCHEMA = 2
# The timeouts of the query for torch: before an installation, and for the text in the plan.
_INSTALL_QUERY_SECONDS, _PLAN_QUERY_SECONDS = 30.0, 4.0


class EnvStep:
    """Builds an environment in the root from its lock files, and reinstalls its missing and damaged packages."""

    essential = False
    local = True  # cached packages can be installed without the network

    def __init__(
        self,
        root: Root,
        definition: EnvironmentDefinition,
        home: Path,
        journal: Journal,
        *,
        offline: bool,
        progress: Progress = no_progress,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Store the arguments.

        Args:
            root: the root, which contains the prefix.
            definition: the definition of the environment.
            home: the user's home folder, with the settings of pip and conda.
            journal: the journal of the run.
            offline: install cached packages only.
            progress: called with the progress of downloads and checks.
            tell: called with texts for the user, such as the selected source of torch.
        """
        self.name = f"environment {definition.name}"
        self.root = root
        self.definition = definition
        self.prefix = root.prefix(definition.name)
        self.home = home
        self.journal = journal
        self.offline = offline
        self.tell = tell
        self.progress = progress
        self.sources = PackageSources(root, os.environ, home, journal, offline, progress)
        self.conda = CondaInstaller(
            definition.locks,
            definition.conda_lock,
            definition.platform,
            definition.python_source,
            self.prefix,
            root,
            self.sources,
            offline,
        )

    def describe(self) -> str:
        """Return the text of this step in the plan; query the sources of torch unless torch is installed."""
        variant = self.definition.variants[0]
        build = f" (torch {variant.torch})" if variant.torch else ""
        text = f"build {self.prefix} from {self.definition.name}/{variant.name}.lock{build}, and verify every checksum"
        if variant.torch is None or self.offline:
            return text
        try:
            routes = self._routes(read_owner(self.prefix) or {}, self._python_version(), _PLAN_QUERY_SECONDS)
            return text if routes.installed else f"{text}; {routes.announce(self.root)}"
        except FirstlightError as error:
            return f"{text}; {error}"

    def check(self, *, deep: bool = False) -> Check:
        """Check the interpreter and the size of each installed file; with `deep`, check the hashes too."""
        result = self._check(deep=deep)
        obstacle = volume_capabilities.environment_obstacle(self.root) if result.state is State.DRIFTED else None
        return Check(State.BLOCKED, obstacle) if obstacle else result

    def _check(self, *, deep: bool) -> Check:
        if not self.prefix.exists() or not any(self.prefix.iterdir()):
            return Check(State.DRIFTED, f"{self.prefix} does not exist yet")
        marker = read_owner(self.prefix)
        if marker is None:
            message = f"{self.prefix} was not made by firstlight. Inspect it (ls -la {self.prefix}), then move it away."
            return Check(State.BLOCKED, message)
        source = python_source(marker)
        if not self.definition.python_source.accepts(source):
            message = (
                f"the Python of {self.prefix} is from {source}, but {self.definition.interpreter} is requested. "
                f"Run `{layout.program()} env remove {self.definition.name}`, then `{layout.next_command('setup')}`."
            )
            return Check(State.BLOCKED, message)
        damage = self._damage(marker, deep=deep)
        if damage:
            return Check(State.DRIFTED, damage)
        return self._ok(marker, deep=deep)

    def apply(self) -> None:
        """Build or repair the environment; packages and files that the user has added are kept.

        Raises:
            BlockedError: the root's file system cannot hold an environment; nothing was installed.
        """
        volume_capabilities.require_environment(self.root)
        self._delete_unfinished()
        self.journal.record(EnvironmentBuild(self.prefix, self.definition.variants[0].name))
        marker = read_owner(self.prefix)
        with self.sources.open(self.definition.variants[0]):
            if marker is None:
                self._build()
            else:
                self._repair(marker)

    def _damage(self, marker: dict[str, object], *, deep: bool) -> str | None:
        """Return a text about the first difference between an environment and its definition; None without one.

        Args:
            marker: the content of the environment's marker file.
            deep: compare the hashes of files, not only their sizes.
        """
        variant = self._variant_of(marker)
        if variant is None:
            return f"has the variant {marker.get('variant')}, but this machine needs {self.definition.variants[0].name}"
        if python_source(marker).is_conda:
            if marker.get("prefix") != str(self.prefix):
                return f"was built as {marker.get('prefix')}; its files must be rewritten for {self.prefix}"
            packages = self.conda.packages()
            reasons = prefix.damaged_conda_packages(self.prefix, packages, deep=deep, progress=self.progress)
            if reasons:
                return _summary(reasons)
        version = prefix.python_version(layout.interpreter(self.prefix))
        if version is None or not self._fits(version, variant):
            return f"{layout.interpreter(self.prefix)} does not run, or has an unsupported version"
        site = environment_marker.site_packages(self.prefix, version)
        locked = self._pip_packages(variant, version, marker)
        reasons = installed_wheels.damaged_packages(site, locked, deep=deep, progress=self.progress)
        return _summary(reasons) if reasons else None

    def _ok(self, marker: dict[str, object], *, deep: bool) -> Check:
        """Return the result of the check of an undamaged environment: its contents, fallbacks and warnings."""
        variant = self._variant_of(marker) or self.definition.variants[0]
        version = prefix.python_version(layout.interpreter(self.prefix)) or ""
        count = len(self._pip_packages(variant, version, marker)) + len(self.conda.packages(marker))
        source = python_source(marker)
        build = f", torch {variant.torch} ({variant.name})" if variant.torch else ""
        verified = "every byte verified" if deep else f"{count} packages as locked"
        sources = self.sources.health.summary()
        detail = f"Python {version} from {source}{build}, {verified}{f': {sources}' if sources else ''}"
        notes = [self.definition.warning] if self.definition.warning else []
        notes += self.sources.health.warnings()
        if variant.name != self.definition.variants[0].name:
            first = self.definition.variants[0]
            reason = f" ({marker['passed']})" if marker.get("passed") else ""
            notes.append(f"torch {first.torch} was not available{reason}; fallback: {first.instead_cost}")
        if source.is_system and marker.get("reason"):
            notes.append(f"conda's Python was not available ({marker['reason']}); fallback: the system's Python")
        notes += filter(None, [package_caches.of(self.root).note])
        if source.is_conda:
            notes += filter(None, [prefix.too_long_for_scripts(self.prefix), self.conda.copy_warning()])
        return Check(State.OK, detail, "; ".join(notes) or None)

    def _build(self) -> None:
        """Build the environment in a temporary folder, and rename that folder to the prefix at the end."""
        new = self.prefix.with_name(f".{self.prefix.name}.building-{uuid.uuid4().hex[:8]}")
        source, reason = self.conda.choose()
        marker: dict[str, object] = {"interpreter": source.value, "prefix": str(self.prefix), "reason": reason}
        routes = self._begin(marker, self._python_version(source), is_new=True)
        pip = self._pip(routes)
        try:
            if source.is_conda:
                self.conda.install(new)
                version = prefix.python_version(layout.interpreter(new))
                if version is None or not self._fits(version, self.definition.variants[0]):
                    raise FirstlightError(
                        f"{self.definition.conda_lock} has Python {version}, but the packages are locked for "
                        f"{', '.join(self._pythons(self.definition.variants[0]))}. Write the locks again: "
                        f"{layout.program()} env lock {self.definition.name}"
                    )
            else:
                version = self._venv(new, pip)
            variant = self._install(new, version, pip, marker, routes)
            rehome_prefix.rewrite(new, str(new), str(self.prefix))
            self._write_marker(new, marker, variant)
            if self.prefix.exists():
                self.prefix.rmdir()  # the folder is empty: `check` blocks any other folder without a marker file
            new.rename(self.prefix)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _repair(self, marker: dict[str, object]) -> None:
        """Install missing and damaged packages again, and replace the old path in a moved conda environment."""
        python = layout.interpreter(self.prefix)
        installed = prefix.python_version(python)
        routes = self._begin(marker, installed or self._python_version(python_source(marker)), is_new=False)
        pip = self._pip(routes)
        if python_source(marker).is_conda:
            is_moved = marker.get("prefix") != str(self.prefix)
            packages = self.conda.packages()
            damaged = prefix.damaged_conda_packages(self.prefix, packages, deep=True)
            if is_moved or damaged:
                names = [package.name for package in packages]
                self.conda.install(self.prefix, names if is_moved else list(damaged))
            if is_moved:
                rehome_prefix.rewrite(self.prefix, str(marker.get("prefix")), str(self.prefix))
            version = prefix.python_version(python)
            if version is None:
                command = f"{layout.program()} env remove {self.definition.name}"
                setup = layout.next_command("setup")
                raise FirstlightError(f"{python} does not run after the repair. Run `{command}`, then `{setup}`.")
        else:
            is_usable = installed is not None and self._fits(installed, self.definition.variants[0])
            version = installed if installed is not None and is_usable else self._venv(self.prefix, pip)
        marker = marker | {"prefix": str(self.prefix)}
        variant = self._install(self.prefix, version, pip, marker, routes)
        self._write_marker(self.prefix, marker, variant)

    def _uv(self) -> uv.UvSources:
        caches, settings = package_caches.of(self.root), self.sources.settings
        return uv.for_uv(os.environ, caches.uv, offline=self.offline, settings=settings, can_link=caches.can_link)

    def _pip(self, routes: InstallRoutes) -> PipInstaller:
        return PipInstaller(self.prefix, routes.uv, self.sources, self.offline)

    def _venv(self, folder: Path, pip: PipInstaller) -> str:
        """Make a virtual environment in a folder, and return its version of Python, such as "3.11.7"."""
        base, version = self._base_python()
        pip.venv(folder, base)
        return version

    def _begin(self, marker: dict[str, object], version: str, *, is_new: bool) -> InstallRoutes:
        """Select the source of torch before any download; report it, and the host's settings without effect."""
        routes = self._routes(marker, version, _INSTALL_QUERY_SECONDS)
        if routes.uv.dropped:
            have = "have" if len(routes.uv.dropped) > 1 else "has"
            self.tell(f"{', '.join(routes.uv.dropped)} {have} no effect here: packages are locked by hash")
        self._ready(routes, is_new=is_new)
        return routes

    def _ready(self, routes: InstallRoutes, *, is_new: bool) -> None:
        """Report the selected source of torch, and check the free space if an environment or variant is new.

        Raises:
            BlockedError: the free space is not sufficient.
        """
        variant = routes.route.variant
        if not routes.is_installed and variant.torch is not None:
            self.tell(routes.announce(self.root))
        if is_new or variant.name != self.definition.variants[0].name:
            if variant.install_bytes is not None:
                self.progress(0, variant.install_bytes)  # an estimate, until an installer reports the exact bytes
            cache = Path(routes.uv.environment["UV_CACHE_DIR"])
            torch_fallback.need_space(variant, self.name, self.root, cache)

    def _routes(self, marker: dict[str, object], version: str, seconds: float) -> InstallRoutes:
        def pins(variant: Variant) -> PinnedPackage | None:
            packages = self._pip_packages(variant, version, marker)
            torch = next((package for package in packages if package.name == "torch"), None)
            if torch is None:
                return None
            _, hashes = self.definition.locks.hashes(variant.name).get("torch", ("", frozenset()))
            return PinnedPackage("torch", torch.version, hashes, version)

        return InstallRoutes(
            self.sources, self._uv(), self.definition.variants, pins, seconds, self._installed_variant(marker, version)
        )

    def _installed_variant(self, marker: dict[str, object], version: str) -> Variant | None:
        """Return the variant of the environment if its torch is installed and undamaged, else None."""
        variant = self._variant_of(marker)
        if variant is None:
            return None
        packages = self._pip_packages(variant, version, marker)
        torch = [package for package in packages if package.name == "torch"]
        site = environment_marker.site_packages(self.prefix, version)
        return None if installed_wheels.damaged_packages(site, torch, deep=False) else variant

    def _python_version(self, source: PythonSource = PythonSource.AUTO) -> str:
        """Return the version of Python that the environment will have."""
        return self.conda.python_version(source) or self._base_python()[1]

    def _base_python(self) -> tuple[Path, str]:
        """Return the path and version of an interpreter on this host for a virtual environment."""
        advice = f"{uv.uv_binary()} python install {self.definition.pythons[0]}"
        return prefix.find_python(self._pythons(self.definition.variants[0]), uv.base_python(), advice)

    def _install(
        self, folder: Path, version: str, pip: PipInstaller, marker: dict[str, object], routes: InstallRoutes
    ) -> Variant:
        """Install the pip packages of the first variant whose torch is available, and return the variant.

        The reasons for a fallback variant are added to `marker`, the content for the marker file, as "passed".
        """

        def attempt(route: InstallRoute) -> None:
            packages = self._pip_packages(route.variant, version, marker)
            if packages:
                # The packages from conda are left out, because uv would overwrite their files.
                conda = {requirements.normal(package.name) for package in self._conda_python_packages(marker)}
                lock = requirements.without(self.definition.locks.text(route.variant.name), conda)
                pip.install(folder, route, version, packages, lock)

        variant = routes.follow(attempt, lambda: self._ready(routes, is_new=False), self.tell)
        if variant.name != self.definition.variants[0].name and routes.rejections:
            marker["passed"] = "; ".join(routes.rejections)
        return variant

    def _pip_packages(
        self, variant: Variant, version: str, marker: dict[str, object]
    ) -> Sequence[requirements.LockedPackage]:
        """Return the packages in the pip lock file, without those that conda installs.

        Args:
            variant: the variant of torch, which has a pip lock file of its own.
            version: the version of the environment's Python, such as "3.11.7".
            marker: the content of the environment's marker file, with the source of Python.

        Raises:
            SpecError: the pip lock file and the conda lock file pin different versions of a package.
        """
        lock = self.definition.locks.pip_file(variant.name)
        if not lock.exists() and variant.torch is None:
            return []
        packages = self.definition.locks.packages(variant.name, version)
        conda = {requirements.normal(package.name): package.version for package in self._conda_python_packages(marker)}
        for package in packages:
            if conda.get(package.name, package.version) != package.version:
                raise SpecError(
                    f"{lock} pins {package.name}=={package.version}, but {self.definition.conda_lock} has "
                    f"{package.name} {conda[package.name]}; pip would overwrite conda's files. Write both locks again: "
                    f"{layout.program()} env lock {self.definition.name}"
                )
        return [package for package in packages if package.name not in conda]

    def _conda_python_packages(self, marker: dict[str, object]) -> list[CondaPackage]:
        return [package for package in self.conda.packages(marker) if package.is_python]

    def _variant_of(self, marker: dict[str, object]) -> Variant | None:
        """Return the variant in the content of a marker file; None if it is not one of this host's variants."""
        variants = self.definition.variants
        return next((variant for variant in variants if variant.name == marker.get("variant")), None)

    def _pythons(self, variant: Variant) -> Sequence[str]:
        """Return the Python versions for which the lock file of a variant has wheels, such as "3.11"."""
        return variant.python or self.definition.pythons

    def _fits(self, version: str, variant: Variant) -> bool:
        return version.rpartition(".")[0] in self._pythons(variant)

    def _delete_unfinished(self) -> None:
        """Delete the temporary folders that were left by killed builds and removals."""
        for folder in self.prefix.parent.glob(f".{self.prefix.name}.building-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _write_marker(self, folder: Path, marker: dict[str, object], variant: Variant) -> None:
        with OpenDir.at(folder) as prefix:
            prefix.sync_file_system()  # no file of an environment with a marker file may be lost in a power cut
        content = marker | {"schema": SCHEMA, "env": self.definition.name, "variant": variant.name}
        if read_owner(folder) != content:
            write_atomic(folder / MARKER_NAME, json.dumps(content, sort_keys=True) + "\n")


def _summary(reasons: dict[str, str]) -> str:
    """Return the first of {package: reason} as text, with the number of the other packages."""
    name, reason = next(iter(reasons.items()))
    return f"{name}: {reason}" + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else "")
