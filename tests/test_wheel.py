"""Tests the source archive and the wheel: their files, and the commands after pip, uv or pipx installed the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from provision.core.version import VERSION
from provision.installers import pip_settings
from provision.installers import uv as uv_installer
from tests.conftest import CHECKOUT, MACHINE, TEST_ROOT

if TYPE_CHECKING:
    from email.message import Message

# The names that .gitignore lists; they are in a checkout and not in the repository.
IGNORED = (".git", ".venv", ".cache", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info")
IGNORED_AT_TOP = {"dist", "results", "host.toml"}
INFO = f"firstlight-{VERSION}.dist-info"
COMMANDS = ("provision", "bench")


@dataclass(frozen=True)
class Built:
    """Holds the source archive and the wheel of a release, and the copy of the checkout from which uv built them."""

    tree: Path
    sdist: Path
    wheel: Path


@dataclass(frozen=True)
class Installed:
    """Describes an installed wheel: the folder with its commands, and the interpreter that imports it."""

    commands: Path
    python: Path

    def run(self, *words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of the wheel in the current folder, with this test's home, without a network; add `env`."""
        path = os.pathsep.join([str(self.commands), "/usr/bin", "/bin"])
        environment = dict(os.environ) | {"PATH": path} | (env or {})
        return subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment, check=False)

    @property
    def envs(self) -> Path:
        """Return the folder `envs` inside the installed package."""
        return next((self.python.parent.parent / "lib").glob("python3*/site-packages/provision/envs"))


def machine(folder: Path) -> dict[str, str]:
    """Return environment variables with which uv uses this machine's package index, and installs into `folder`."""
    cache = CHECKOUT / ".cache/uv"
    settings = MACHINE | {"UV_CACHE_DIR": str(cache), "HOME": str(folder)}
    found = uv_installer.for_uv(settings, cache, offline=False).environment
    places = {
        name: str(folder / name.lower()) for name in ("UV_TOOL_DIR", "UV_TOOL_BIN_DIR", "PIPX_HOME", "PIPX_BIN_DIR")
    }
    return {name: value for name, value in found.items() if not name.startswith(("XDG_", "PIPX_"))} | places


def run(argv: list[object], env: dict[str, str], where: Path) -> None:
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, env=env, cwd=where, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build the source archive from a copy of the checkout, and the wheel from the source archive."""
    folder = tmp_path_factory.mktemp("release")
    tree, dist = folder / "tree", folder / "dist"
    shutil.copytree(CHECKOUT, tree, ignore=_ignored, symlinks=True)
    build: list[object] = [sys.executable, "-m", "uv", "build", "--quiet", "--python", uv_installer.base_python()]
    run([*build, "--out-dir", dist, tree], machine(folder), folder)
    return Built(tree, dist / f"firstlight-{VERSION}.tar.gz", dist / f"firstlight-{VERSION}-py3-none-any.whl")


def _ignored(folder: str, names: list[str]) -> set[str]:
    at_top = IGNORED_AT_TOP & set(names) if Path(folder) == CHECKOUT else set()
    return at_top | shutil.ignore_patterns(*IGNORED)(folder, names)


@pytest.fixture(scope="session")
def by_uv(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel and its dependencies, in the versions of the toolbox, with `uv tool install`."""
    folder = tmp_path_factory.mktemp("uv")
    install: list[object] = [sys.executable, "-m", "uv", "tool", "install", "--quiet"]
    install += ["--python", uv_installer.base_python()]
    install += ["--constraints", CHECKOUT / "envs/toolbox/requirements.lock", built.wheel]
    run(install, machine(folder), folder)
    return Installed(folder / "uv_tool_bin_dir", folder / "uv_tool_dir/firstlight/bin/python")


@pytest.fixture(scope="session")
def by_pip(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install only the wheel with pip, and import its dependencies from the toolbox: it saves a minute of downloads."""
    folder = tmp_path_factory.mktemp("pip")
    venv = folder / "venv"
    run([uv_installer.base_python(), "-m", "venv", "--without-pip", venv], dict(os.environ), folder)
    python = venv / "bin/python"
    pip: list[object] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    run([*pip, built.wheel], dict(os.environ), folder)
    packages = next(venv.glob("lib/python3*/site-packages"))
    # A folder that a .pth file names is added to sys.path, and the .pth files in that folder are ignored. So the
    # toolbox's own .pth file does not add the checkout.
    (packages / "toolbox.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Installed(venv / "bin", python)


@pytest.fixture(scope="session")
def by_pipx(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel and its dependencies with pipx, which uv downloads; skip the test if uv cannot."""
    folder = tmp_path_factory.mktemp("pipx")
    env = machine(folder)
    # With uv on PATH, pipx installs by uv; with pip it would need a minute.
    env |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]]), "PIPX_DEFAULT_BACKEND": "uv"}
    pipx: list[object] = [sys.executable, "-m", "uv", "tool", "run", "--quiet", "pipx"]
    start = subprocess.run([*map(str, pipx), "--version"], capture_output=True, text=True, env=env, check=False)
    if start.returncode != 0:
        pytest.skip(f"uv cannot download pipx: {start.stderr.strip()[-200:]}")
    env["UV_CONSTRAINT"] = str(CHECKOUT / "envs/toolbox/requirements.lock")
    run([*pipx, "install", "--python", uv_installer.base_python(), built.wheel], env, folder)
    return Installed(folder / "pipx_bin_dir", folder / "pipx_home/venvs/firstlight/bin/python")


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def metadata(built: Built) -> Message:
    with zipfile.ZipFile(built.wheel) as archive:
        return message_from_bytes(archive.read(f"{INFO}/METADATA"))


def test_source_archive_holds_every_file_of_the_repository(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert names == files_of(built.tree) | {"PKG-INFO"}


def test_wheel_holds_both_packages_the_envs_folder_and_the_licence(built: Built) -> None:
    expected = {f"{package}/{file}" for package in COMMANDS for file in files_of(built.tree / package)}
    expected |= {f"provision/envs/{file}" for file in files_of(built.tree / "envs")}
    expected |= {f"{INFO}/{file}" for file in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    with zipfile.ZipFile(built.wheel) as archive:
        assert set(archive.namelist()) == expected
        assert archive.read(f"{INFO}/licenses/LICENSE") == (CHECKOUT / "LICENSE").read_bytes()


def test_wheel_metadata_names_version_licence_and_the_dependencies_of_the_toolbox(built: Built) -> None:
    found = metadata(built)
    assert (found["Name"], found["Version"], found["License-Expression"]) == ("firstlight", VERSION, "Apache-2.0")
    lines = (CHECKOUT / "envs/toolbox/requirements.in").read_text(encoding="utf-8").splitlines()
    toolbox = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
    needed = {canonicalize_name(Requirement(row).name) for row in found.get_all("Requires-Dist") or []}
    assert needed == toolbox | {"pip"}, "the toolbox is a venv, which has a pip of its own"


@pytest.mark.parametrize("installer", ["by_uv", "by_pip", "by_pipx"])
def test_commands_of_an_installed_wheel_read_the_packaged_envs_folder(
    installer: str, request: pytest.FixtureRequest
) -> None:
    wheel: Installed = request.getfixturevalue(installer)
    for command in COMMANDS:
        done = wheel.run(command, "--version")
        assert (done.returncode, done.stdout) == (0, f"{command} {VERSION}\n"), done.stderr
    assert wheel.run("provision", "--help").returncode == 0
    plan = wheel.run("provision", "plan")
    assert plan.returncode == 3, plan.stdout + plan.stderr
    assert "from diffusers/cpu.lock" in plan.stdout or "from diffusers/cu" in plan.stdout
    assert "to correct them, run `provision setup`" in plan.stdout
    suites = json.loads(wheel.run("bench", "list", "--json").stdout)
    assert {"quick", "full"} <= set(suites["suites"])
    assert "stable-diffusion-v1-5" in suites["models"], "an architecture of the packaged envs"
    where = wheel.run(wheel.python, "-c", "import provision, bench; print(provision.__file__, bench.__file__)").stdout
    assert str(CHECKOUT) not in where


def test_messages_of_an_installed_wheel_name_provision_commands_instead_of_make(by_uv: Installed) -> None:
    listed = by_uv.run("provision", "models", "list")
    assert (listed.returncode, "stable-diffusion-v1-5" in listed.stdout) == (0, True)
    told = {
        ("provision", "env", "list"): "to build one, run `provision setup`",
        ("provision", "env", "run", "--", "true"): "Run `provision setup`, or `provision env create diffusers`.",
        ("provision", "repair"): "Mount the volume and run `provision repair`, or run `provision setup`.",
        ("bench", "report"): "results has no run. Run `bench run` first.",
        ("bench", "run"): "Run `provision setup`, or name an interpreter with --python.",
    }
    for words, text in told.items():
        done = by_uv.run(*words)
        assert text in done.stdout + done.stderr
        assert "make" not in (done.stdout + done.stderr).replace("makes", "")


@pytest.mark.parametrize(
    "words", [("env", "lock", "diffusers"), ("models", "lock", "ddpm-cat-256")], ids=["env lock", "models lock"]
)
def test_lock_command_refuses_to_write_into_the_installed_package(by_uv: Installed, words: tuple[str, ...]) -> None:
    before = {file: (by_uv.envs / file).read_bytes() for file in files_of(by_uv.envs)}
    done = by_uv.run("provision", *words, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["kind"], error["next"]) == (4, "blocked", f"cp -r {by_uv.envs} envs")
    assert "belongs to the installed package, and an upgrade replaces it" in error["message"]
    assert {file: (by_uv.envs / file).read_bytes() for file in files_of(by_uv.envs)} == before


def test_envs_folder_in_the_current_folder_is_used_instead_of_the_packaged_one(
    by_uv: Installed, tmp_path: Path
) -> None:
    entry = (by_uv.envs / "models.toml").read_text(encoding="utf-8")
    shutil.copytree(by_uv.envs, "envs")
    Path("envs/models.toml").write_text(entry.replace("[ddpm-cat-256]", "[my-cat]"), encoding="utf-8")
    assert "my-cat" in by_uv.run("provision", "models", "list").stdout
    named = by_uv.run("provision", "models", "list", "--envs", by_uv.envs).stdout
    assert ("my-cat" in named, "ddpm-cat-256" in named) == (False, True)
    # `env lock` accepts this copy: it fails only because the environment is absent.
    lock = by_uv.run("provision", "env", "lock", "absent")
    assert (lock.returncode, "environment" in lock.stderr) == (2, True)


def test_folder_named_envs_without_torch_toml_is_ignored(by_uv: Installed) -> None:
    Path("envs/diffusers").mkdir(parents=True)
    assert "ddpm-cat-256" in by_uv.run("provision", "models", "list").stdout


@pytest.mark.worker
def test_setup_by_an_installed_wheel_builds_an_environment_that_passes_the_smoke_test(
    by_uv: Installed, tmp_path: Path, measured_python: Path
) -> None:
    settings = pip_settings.pip_settings(MACHINE)
    names = ("index-url", "extra-index-url", "find-links")
    env = {f"PIP_{name.upper().replace('-', '_')}": " ".join(settings[name]) for name in names if name in settings}
    env["UV_CACHE_DIR"] = str(TEST_ROOT / "cache/uv")
    host = CHECKOUT / "tests/data/host.toml"
    done = by_uv.run("provision", "setup", "--offline", "--json", "--root", tmp_path / "root", "--host", host, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {row["step"]: row for row in json.loads(done.stdout)["outcomes"]}
    assert "one denoising step on cpu" in outcomes["smoke"]["detail"]
