"""Tests `provision env lock` with a conda channel and an index on loopback, and the lock files that it writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import FirstlightError, SpecError
from provision.environments import write_locks
from provision.installers import uv as uv_installer
from provision.lockfiles import conda_lock
from tests.conftest import CHECKOUT, MACHINE
from tests.provision import conda_channel
from tests.provision.conftest import write_wheel
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def definition_folder(tmp_path: Path, envs: Path, wheels: Path) -> Path:
    """Make the definition folder of an environment without lock files, and return the folder."""
    write_wheel(wheels, "greet", "1.0", {"greet.py": "def main():\n    print('hello from pip')\n"})
    folder = envs / "mine"
    folder.mkdir()
    (folder / "environment.yml").write_text("channels: [conda-forge]\ndependencies:\n- python\n- hello\n")
    return folder


def test_environment_with_conda_and_pip_packages_is_locked_and_built_from_its_locks(
    tmp_path: Path,
    definition_folder: Path,
    envs: Path,
    conda: conda_channel.FolderServer,
    index: conda_channel.FolderServer,
    root_flags: list[object],
) -> None:
    (definition_folder / "requirements.in").write_text("greet\n")
    completed = provision("env", "lock", "mine", "--envs", envs, "--platform", conda_channel.PLATFORM)
    assert completed.returncode == 0, completed.stderr
    names = ("conda-lock.yml", "requirements.lock", "witnesses.toml")
    assert completed.stdout.split() == [str(definition_folder / name) for name in names]
    packages = conda_lock.read_lock(definition_folder / "conda-lock.yml")
    assert next((package.name, package.version) for package in packages) == ("hello", "2.0")
    assert all(package.url.startswith(conda_channel.CANONICAL) for package in packages)
    pip_lock = (definition_folder / "requirements.lock").read_text()
    assert "greet==1.0" in pip_lock
    assert "http" not in pip_lock
    created = provision("env", "create", "mine", *root_flags, "--envs", envs)
    assert created.returncode == 0, created.stdout + created.stderr
    assert "Python" in created.stdout
    program = provision("env", "run", "--env", "mine", *root_flags, "--", "python", "-c", "import greet; greet.main()")
    assert program.stdout.strip() == "hello from pip", program.stderr
    conda_text = (definition_folder / "conda-lock.yml").read_text()
    assert provision("env", "lock", "mine", "--envs", envs).returncode == 0
    assert (definition_folder / "conda-lock.yml").read_text() == conda_text, "the same solution gives the same bytes"


def test_env_create_without_a_lock_file_is_rejected_and_suggests_env_lock(
    definition_folder: Path, envs: Path, root_flags: list[object]
) -> None:
    completed = provision("env", "create", "mine", *root_flags, "--envs", envs)
    assert completed.returncode == 2
    assert "is not locked yet. Run `" in completed.stderr


def test_env_lock_writes_a_pip_lock_only_if_environment_yml_has_a_pip_section(
    definition_folder: Path,
    envs: Path,
    conda: conda_channel.FolderServer,
    index: conda_channel.FolderServer,
    root_flags: list[object],
) -> None:
    assert provision("env", "lock", "mine", "--envs", envs, "--platform", conda_channel.PLATFORM).returncode == 0
    assert not (definition_folder / "requirements.lock").exists()
    created = provision("env", "create", "mine", *root_flags, "--envs", envs)
    assert created.returncode == 0, created.stdout + created.stderr
    (definition_folder / "environment.yml").write_text("dependencies:\n- python\n- pip:\n  - greet\n")
    assert provision("env", "lock", "mine", "--envs", envs).returncode == 0
    assert "greet==1.0" in (definition_folder / "requirements.lock").read_text()


@pytest.mark.parametrize(
    ("yml", "requirements", "message"),
    [
        (
            "dependencies:\n- numpy=2\n- pip:\n  - greet\n  - NumPy>=1\n",
            None,
            r"line 2 requires .* from conda.*line 5 requires NumPy>=1 from pip",
        ),
        (
            "dependencies:\n- python\n- greet\n",
            "# ours\ngreet==1.0\n",
            r"line 3 requests greet from conda.*line 2 requests greet==1.0 from pip",
        ),
        ("dependencies:\n- pip:\n  - greet\n", "greet\n", r"line 3: requirements.in also lists pip's packages"),
        ("dependencies: 3\n", None, "has no list `dependencies:`"),
        ("dependencys: []\n", None, "has no list `dependencies:`"),
        ("name: [\n", None, "not valid YAML"),
        ("dependencies: []\nprefixes: 1\n", None, "line 2: unknown key prefixes"),
        ("dependencies: []\nplatforms: [amiga]\n", None, "unknown platform amiga"),
    ],
)
def test_wrong_or_conflicting_environment_yml_is_rejected_with_the_reason(
    definition_folder: Path, envs: Path, yml: str, requirements: str | None, message: str
) -> None:
    (definition_folder / "environment.yml").write_text(yml)
    if requirements:
        (definition_folder / "requirements.in").write_text(requirements)
    completed = provision("env", "lock", "mine", "--envs", envs, "--keep-conda")
    assert completed.returncode == 2, completed.stdout
    assert re.search(message, completed.stderr), completed.stderr
    assert "Traceback" not in completed.stderr


def test_env_lock_fails_if_pip_finds_no_package_with_the_version_of_the_conda_lock(
    definition_folder: Path, envs: Path, index: conda_channel.FolderServer, wheels: Path
) -> None:
    (definition_folder / "requirements.in").write_text("greet\n")
    package = conda_lock.CondaPackage(
        "greet", "0.5", conda_channel.PLATFORM, "x/greet-0.5-0.conda", "0" * 32, "0" * 64, {"python": "*"}
    )
    (definition_folder / "conda-lock.yml").write_text(
        conda_lock.lock_text([package], ["conda-forge"], ["environment.yml"])
    )
    with pytest.raises(FirstlightError, match=r"greet==0\.5"):
        write_locks.lock(envs, "mine", write_locks.SolverOptions(None, {}, [], keep_conda=True))


def test_env_lock_with_conda_lock_is_blocked_if_no_conda_program_is_found(definition_folder: Path, envs: Path) -> None:
    completed = provision("env", "lock", "mine", "--envs", envs, "--with", "conda-lock", env={"PATH": "/nonexistent"})
    assert completed.returncode == 4, completed.stderr
    assert "conda-lock needs one of conda, mamba, micromamba" in completed.stderr


def test_conda_lock_gets_only_the_conda_packages_and_mirror_urls_become_official(
    definition_folder: Path, envs: Path, tmp_path: Path
) -> None:
    """Replace conda-lock, which needs a real conda, by a script that writes the URLs of a mirror like conda-lock."""
    package = conda_lock.CondaPackage(
        "hello", "1", "linux-64", "M/conda-forge/noarch/hello-1-0.conda", "0" * 32, "0" * 64
    )
    lock = tmp_path / "answer"
    text = conda_lock.lock_text([package], ["conda-forge"], ["environment.yml"])
    lock.write_text(text.replace("url: M", "url: https://m.example"))
    programs = tmp_path / "bin"
    programs.mkdir()
    script = f'echo "$CONDA_EXE $@" > {tmp_path}/arguments; cat "$3" >> {tmp_path}/arguments; cp {lock} "$5"'
    for name, body in (("conda", "exit 0"), ("conda-lock", script)):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    (definition_folder / "environment.yml").write_text("dependencies:\n- hello\n- pip:\n  - greet\n")
    changes = {"PATH": f"{programs}:{os.environ['PATH']}", "CONDA_CHANNEL_ALIAS": "https://m.example"}
    options = write_locks.SolverOptions(
        ["linux-64"], {"https://conda.anaconda.org/": "https://m.example/"}, [], tool="conda-lock"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        packages = write_locks.solve_conda(definition_folder, options)
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith(f"{programs / 'conda'} lock --file ")
    assert "--platform linux-64" in arguments
    assert '"dependencies": ["hello"]' in arguments, "conda-lock gets no pip packages"
    assert [package.url for package in packages] == [f"{conda_channel.CANONICAL}/noarch/hello-1-0.conda"]


def test_flag_virtual_is_rejected_together_with_conda_lock(definition_folder: Path, envs: Path) -> None:
    completed = provision("env", "lock", "mine", "--envs", envs, "--with", "conda-lock", "--virtual", "__cuda=12")
    assert (completed.returncode, "--virtual is for rattler" in completed.stderr) == (2, True)


def test_real_conda_lock_program_reads_the_shipped_lock_file(tmp_path: Path) -> None:
    """Run the parser of conda-lock 4 in an environment that is installed from interop.lock."""
    folder = tmp_path / "interop"
    pinned = CHECKOUT / "envs/toolbox/interop.lock"

    uv = [sys.executable, "-m", "uv"]
    settings = MACHINE | {"UV_CACHE_DIR": str(CHECKOUT / ".cache/uv"), "HOME": str(tmp_path)}
    environment = uv_installer.for_uv(settings, CHECKOUT / ".cache/uv", offline=False).environment
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, folder], check=True, env=environment)
    install = [
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--python",
        folder / "bin/python",
        "-r",
        pinned,
    ]
    subprocess.run([*uv, *map(str, install)], check=True, env=environment)
    code = "import sys; from pathlib import Path; from conda_lock.lockfile import parse_conda_lock_file as p; "
    code += "l = p(Path(sys.argv[1])); print(len(l.package), *sorted(l.metadata.platforms))"
    shipped = CHECKOUT / "envs/diffusers/conda-lock.yml"
    completed = subprocess.run([folder / "bin/python", "-c", code, shipped], capture_output=True, text=True, check=True)
    assert completed.stdout.split() == ["82", "linux-64", "osx-64", "osx-arm64", "win-64"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("sha256: '", "sha256: 'zz", 1), r"line 1\d: not a pinned conda package"),
        (lambda text: text.replace("manager: conda", "manager: pip", 1), "not a pinned conda package"),
        (lambda text: text.replace("version: 1\n", "version: 9\n", 1), "is not a conda-lock file of version 1"),
        (lambda _: "[1, 2", "not valid YAML"),
        (lambda _: "", "is not a conda-lock file of version 1"),
    ],
)
def test_corrupt_conda_lock_file_is_rejected_with_its_line_or_the_reason(
    tmp_path: Path, change: Any, message: str
) -> None:
    lock = tmp_path / "conda-lock.yml"
    lock.write_text(change((CHECKOUT / "envs/diffusers/conda-lock.yml").read_text()))
    with pytest.raises(SpecError, match=message):
        conda_lock.read_lock(lock)


def test_shipped_conda_lock_file_is_the_same_after_reading_and_writing(tmp_path: Path) -> None:
    packages = conda_lock.read_lock(CHECKOUT / "envs/diffusers/conda-lock.yml")
    text = conda_lock.lock_text(packages, ["conda-forge"], ["environment.yml"])
    assert text == (CHECKOUT / "envs/diffusers/conda-lock.yml").read_text()
