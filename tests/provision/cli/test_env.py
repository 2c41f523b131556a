"""Tests the commands `provision env`, except `env lock`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.layout import Root
from provision.environments import conda_pip_conflicts, discover
from tests.provision.conftest import write_wheel
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision import conda_channel

HOST = "relocate = []\nmodels = []\n"


@pytest.fixture
def conda_base(home: Path) -> Path:
    """Make the folders by which firstlight recognizes a conda installation; return the installation's folder."""
    folder = home / "miniconda3"
    (folder / "conda-meta").mkdir(parents=True)
    (folder / "envs").mkdir()
    return folder


def listed_environments(*root_flags: object) -> dict[str, dict[str, Any]]:
    """Run `env list --json`, and return {name: object of the environment}."""
    completed = provision("env", "list", *root_flags, "--json")
    assert completed.returncode == 0, completed.stderr
    output = json.loads(completed.stdout)
    assert set(output) == {"schema", "envs"}
    return {environment["name"]: environment for environment in output["envs"]}


def test_env_commands_create_run_list_and_remove_a_conda_environment(
    tmp_path: Path,
    home: Path,
    root_flags: list[object],
    conda_envs: Path,
    conda: conda_channel.FolderServer,
    conda_base: Path,
) -> None:
    created = provision("env", "create", *root_flags, "--envs", conda_envs, "--interpreter", "conda")
    assert created.returncode == 0, created.stdout + created.stderr
    prefix = tmp_path / "root/envs/diffusers"
    assert "conda activate diffusers" in created.stdout
    assert (home / ".conda/envs/diffusers").readlink() == prefix
    assert provision("env", "where", "diffusers", *root_flags).stdout.strip() == str(prefix)

    completed = provision(
        "env", "run", *root_flags, "--", "python", "-c", "import sys, torch; print(sys.prefix); sys.exit(7)"
    )
    assert (completed.returncode, completed.stdout.strip()) == (7, str(prefix))
    assert provision("env", "run", *root_flags, "--", "hello").stdout.strip() == "hello from conda"
    assert provision("env", "run", *root_flags, "--", "no-such-program").returncode == 2

    environments = listed_environments(*root_flags)
    assert set(environments) == {"diffusers", "base"}
    ours = environments["diffusers"]
    keys = "name prefix manager interpreter variant packages mixed activatable size_bytes on_volume"
    assert set(ours) == set(keys.split())
    assert (ours["manager"], ours["variant"], ours["mixed"], ours["on_volume"]) == ("conda", "cpu", [], True)
    assert ours["interpreter"] == f"Python {'.'.join(str(part) for part in sys.version_info[:3])}"
    assert ours["packages"] == 5
    text = provision("env", "list", *root_flags).stdout
    assert "diffusers" in text
    assert "MIXED" not in text

    unconfirmed = provision("env", "remove", "diffusers", *root_flags)
    assert unconfirmed.returncode == 2
    assert "--yes" in unconfirmed.stderr
    assert prefix.exists()
    removed = provision("env", "remove", "diffusers", *root_flags, "--yes")
    assert removed.returncode == 0, removed.stderr
    assert not prefix.exists()
    assert not (home / ".conda/envs/diffusers").is_symlink()
    assert provision("env", "remove", "diffusers", *root_flags, "--yes").returncode == 2
    assert provision("env", "run", *root_flags, "--", "python").returncode == 4


def test_env_remove_is_blocked_while_a_program_of_the_environment_runs(
    tmp_path: Path, root_flags: list[object], envs: Path
) -> None:
    assert provision("env", "create", *root_flags, "--envs", envs).returncode == 0
    python = tmp_path / "root/envs/diffusers/bin/python"
    program = subprocess.Popen(
        [python, "-c", "print(1, flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert program.stdout is not None
        program.stdout.readline()
        refused = provision("env", "remove", "diffusers", *root_flags, "--yes")
        assert refused.returncode == 4
        assert f"pid {program.pid}" in refused.stderr
    finally:
        program.communicate(b"\n")
    assert provision("env", "remove", "diffusers", *root_flags, "--yes").returncode == 0


def test_env_remove_is_blocked_for_a_folder_that_firstlight_did_not_make(
    tmp_path: Path, root_flags: list[object]
) -> None:
    (tmp_path / "root/envs/mine").mkdir(parents=True)
    refused = provision("env", "remove", "mine", *root_flags, "--yes")
    assert (refused.returncode, (tmp_path / "root/envs/mine").is_dir()) == (4, True)


def test_repair_after_a_wipe_restores_the_link_by_which_conda_finds_the_environment(
    tmp_path: Path,
    home: Path,
    root_flags: list[object],
    conda_envs: Path,
    conda: conda_channel.FolderServer,
    conda_base: Path,
) -> None:
    assert provision("env", "create", *root_flags, "--envs", conda_envs).returncode == 0
    shutil.rmtree(home / ".conda")
    repaired = provision("repair", *root_flags, "--envs", conda_envs, "--offline")
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert (home / ".conda/envs/diffusers").is_symlink()


def test_new_environment_is_activated_by_its_path_if_conda_already_has_the_name(
    tmp_path: Path,
    home: Path,
    root_flags: list[object],
    conda_envs: Path,
    conda: conda_channel.FolderServer,
    conda_base: Path,
) -> None:
    (conda_base / "envs/diffusers").mkdir()
    created = provision("env", "create", *root_flags, "--envs", conda_envs)
    assert created.returncode == 0
    assert f"conda activate {tmp_path / 'root/envs/diffusers'}" in created.stdout
    assert not (home / ".conda").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["create", "../../etc"], 2, "'../../etc' is no name of an environment"),
        (["create", "nonsense"], 2, "unknown environment 'nonsense'; available: diffusers"),
        (["create", "--variant", "cu999"], 2, "unknown variant 'cu999'"),
        (["create", "--interpreter", "brew"], 2, "unknown interpreter 'brew'; available: auto, conda, system"),
        (["create", "--interpreter", "conda"], 2, "has no conda-lock.yml"),
    ],
)
def test_env_create_with_a_wrong_argument_is_rejected_with_the_reason(
    envs: Path, root_flags: list[object], arguments: list[str], code: int, message: str
) -> None:
    completed = provision("env", *arguments, *root_flags, "--envs", envs)
    assert completed.returncode == code, completed.stdout + completed.stderr
    assert message in completed.stdout + completed.stderr
    assert "Traceback" not in completed.stderr


def test_dangling_link_of_the_user_with_the_name_of_a_new_environment_is_kept_and_reported(
    tmp_path: Path,
    home: Path,
    root_flags: list[object],
    conda_envs: Path,
    conda: conda_channel.FolderServer,
    conda_base: Path,
) -> None:
    link = home / ".conda/envs/diffusers"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "not mounted")
    created = provision("env", "create", *root_flags, "--envs", conda_envs)
    assert created.returncode == 0
    assert link.readlink() == tmp_path / "not mounted"
    assert f"conda uses the name diffusers for {link}" in created.stdout


def test_pip_package_that_replaces_a_conda_package_is_listed_as_mixed(
    tmp_path: Path, root_flags: list[object], conda_envs: Path, conda: conda_channel.FolderServer, wheels: Path
) -> None:
    assert provision("env", "create", *root_flags, "--envs", conda_envs).returncode == 0
    prefix = tmp_path / "root/envs/diffusers"
    assert conda_pip_conflicts.conflicts(prefix) == []
    write_wheel(wheels, "pip", "99.0", {"pip/__init__.py": ""})
    write_wheel(wheels, "fine", "1.0", {"fine.py": ""})
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-index", "--find-links", wheels]
    subprocess.run([*map(str, uv), "--python", str(prefix / "bin/python"), "pip==99.0", "fine"], check=True)
    pip = next(prefix.glob("conda-meta/pip-*.json"))
    version = json.loads(pip.read_text())["version"]
    assert conda_pip_conflicts.conflicts(prefix) == [f"pip 99.0 from pip replaces {version} from conda"]
    assert "MIXED: pip 99.0 from pip replaces" in provision("env", "list", *root_flags).stdout


def test_pip_package_that_a_conda_package_depends_on_is_reported_as_a_conflict(tmp_path: Path) -> None:
    meta = tmp_path / "conda-meta"
    meta.mkdir()
    record = {
        "name": "scipy",
        "version": "1",
        "depends": ["numpy >=1", "python", "__glibc"],
        "paths_data": {"paths": []},
    }
    (meta / "scipy-1-0.json").write_text(json.dumps(record))
    (tmp_path / "lib/python3.11/site-packages/numpy-2.0.dist-info").mkdir(parents=True)
    assert conda_pip_conflicts.conflicts(tmp_path) == ["numpy 2.0 from pip, but conda's scipy depends on it"]


def test_env_list_finds_conda_environments_and_venvs_in_all_usual_folders(
    tmp_path: Path, home: Path, conda_base: Path, root_flags: list[object]
) -> None:
    for folder in (conda_base / "envs/one", tmp_path / "dirs/two", tmp_path / "three"):
        (folder / "conda-meta").mkdir(parents=True)
    (conda_base / "envs/one/file").write_bytes(b"x" * 1000)
    (home / ".condarc").write_text(f"envs_dirs: [{tmp_path / 'dirs'}]\n")
    (home / ".conda").mkdir()
    (home / ".conda/environments.txt").write_text(f"{tmp_path / 'three'}\n{tmp_path / 'gone'}\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / ".virtualenvs/four"], check=True)
    environments = listed_environments(*root_flags)
    assert set(environments) == {"base", "one", "two", "three", "four"}
    assert (environments["four"]["manager"], environments["one"]["manager"]) == ("venv", "conda")
    assert environments["one"]["activatable"] == "conda activate one"
    sizes = (environments["one"]["size_bytes"], environments["base"]["size_bytes"])
    assert sizes == (1000, 0), "the size of base excludes the other environments"
    assert not any(environment["on_volume"] for environment in environments.values())


def test_root_that_does_not_exist_yields_an_empty_list_of_environments(tmp_path: Path, home: Path) -> None:
    assert discover.environments(Root(tmp_path / "none"), home, {"PATH": ""}) == []
