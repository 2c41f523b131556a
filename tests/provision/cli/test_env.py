"""`provision env`: what a person does with environments, through the real command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import FirstlightError, SpecError
from provision.core.layout import Root
from provision.environments import conda_pip_conflicts, discover, write_locks
from provision.lockfiles import conda_lock
from tests.conftest import CHECKOUT
from tests.provision import conda_channel
from tests.provision.conftest import write_wheel
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from pathlib import Path

HOST = "relocate = []\nmodels = []\n"


@pytest.fixture
def flags(tmp_path: Path) -> list[object]:
    (tmp_path / "host.toml").write_text(HOST)
    return ["--root", tmp_path / "root", "--host", tmp_path / "host.toml"]


@pytest.fixture
def base(home: Path) -> Path:
    """What a conda installation looks like from outside."""
    folder = home / "miniconda3"
    (folder / "conda-meta").mkdir(parents=True)
    (folder / "envs").mkdir()
    return folder


def listed(*flags: object) -> dict[str, dict[str, Any]]:
    done = provision("env", "list", *flags, "--json")
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert set(whole) == {"schema", "envs"}
    return {each["name"]: each for each in whole["envs"]}


def test_from_nothing_to_removed(
    tmp_path: Path, home: Path, flags: list[object], conda_envs: Path, conda: conda_channel.Served, base: Path
) -> None:
    made = provision("env", "create", *flags, "--envs", conda_envs, "--interpreter", "conda")
    assert made.returncode == 0, made.stdout + made.stderr
    prefix = tmp_path / "root/envs/diffusers"
    assert "conda activate diffusers" in made.stdout
    assert (home / ".conda/envs/diffusers").readlink() == prefix
    assert provision("env", "where", "diffusers", *flags).stdout.strip() == str(prefix)

    ran = provision("env", "run", *flags, "--", "python", "-c", "import sys, torch; print(sys.prefix); sys.exit(7)")
    assert (ran.returncode, ran.stdout.strip()) == (7, str(prefix))
    assert provision("env", "run", *flags, "--", "hello").stdout.strip() == "hello from conda"
    assert provision("env", "run", *flags, "--", "no-such-program").returncode == 2

    found = listed(*flags)
    assert set(found) == {"diffusers", "base"}
    ours = found["diffusers"]
    keys = "name prefix manager interpreter variant packages mixed activatable size_bytes on_volume"
    assert set(ours) == set(keys.split())
    assert (ours["manager"], ours["variant"], ours["mixed"], ours["on_volume"]) == ("conda", "cpu", [], True)
    assert ours["interpreter"] == f"Python {'.'.join(str(part) for part in sys.version_info[:3])}"
    assert ours["packages"] == 5
    text = provision("env", "list", *flags).stdout
    assert "diffusers" in text
    assert "MIXED" not in text

    asked = provision("env", "remove", "diffusers", *flags)
    assert asked.returncode == 2
    assert "--yes" in asked.stderr
    assert prefix.exists()
    gone = provision("env", "remove", "diffusers", *flags, "--yes")
    assert gone.returncode == 0, gone.stderr
    assert not prefix.exists()
    assert not (home / ".conda/envs/diffusers").is_symlink()
    assert provision("env", "remove", "diffusers", *flags, "--yes").returncode == 2
    assert provision("env", "run", *flags, "--", "python").returncode == 4


def test_an_environment_at_work_is_not_removed(tmp_path: Path, flags: list[object], envs: Path) -> None:
    assert provision("env", "create", *flags, "--envs", envs).returncode == 0
    python = tmp_path / "root/envs/diffusers/bin/python"
    busy = subprocess.Popen(
        [python, "-c", "print(1, flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        refused = provision("env", "remove", "diffusers", *flags, "--yes")
        assert refused.returncode == 4
        assert f"pid {busy.pid}" in refused.stderr
    finally:
        busy.communicate(b"\n")
    assert provision("env", "remove", "diffusers", *flags, "--yes").returncode == 0


def test_what_is_not_ours_is_not_removed(tmp_path: Path, flags: list[object]) -> None:
    (tmp_path / "root/envs/mine").mkdir(parents=True)
    refused = provision("env", "remove", "mine", *flags, "--yes")
    assert (refused.returncode, (tmp_path / "root/envs/mine").is_dir()) == (4, True)


def test_a_wiped_home_gets_condas_link_back(
    tmp_path: Path, home: Path, flags: list[object], conda_envs: Path, conda: conda_channel.Served, base: Path
) -> None:
    assert provision("env", "create", *flags, "--envs", conda_envs).returncode == 0
    shutil.rmtree(home / ".conda")
    mended = provision("repair", *flags, "--envs", conda_envs, "--offline")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert (home / ".conda/envs/diffusers").is_symlink()


def test_condas_own_environment_of_this_name_keeps_it(
    tmp_path: Path, home: Path, flags: list[object], conda_envs: Path, conda: conda_channel.Served, base: Path
) -> None:
    (base / "envs/diffusers").mkdir()
    made = provision("env", "create", *flags, "--envs", conda_envs)
    assert made.returncode == 0
    assert f"conda activate {tmp_path / 'root/envs/diffusers'}" in made.stdout
    assert not (home / ".conda").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["create", "../../etc"], 2, "'../../etc' is no name of an environment"),
        (["create", "nonsense"], 2, "unknown environment 'nonsense'; there is: diffusers"),
        (["create", "--variant", "cu999"], 2, "unknown variant 'cu999'"),
        (["create", "--interpreter", "brew"], 2, "unknown interpreter 'brew'; there is: auto, conda, system"),
        (["create", "--interpreter", "conda"], 2, "has no conda-lock.yml"),
    ],
)
def test_a_wrong_wish_is_refused(envs: Path, flags: list[object], words: list[str], code: int, told: str) -> None:
    done = provision("env", *words, *flags, "--envs", envs)
    assert done.returncode == code, done.stdout + done.stderr
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_somebodys_link_that_leads_nowhere_is_left_alone(
    tmp_path: Path, home: Path, flags: list[object], conda_envs: Path, conda: conda_channel.Served, base: Path
) -> None:
    link = home / ".conda/envs/diffusers"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "not mounted")
    made = provision("env", "create", *flags, "--envs", conda_envs)
    assert made.returncode == 0
    assert link.readlink() == tmp_path / "not mounted"
    assert f"conda has {link} under this name" in made.stdout


def test_what_pip_put_over_conda_is_seen(
    tmp_path: Path, flags: list[object], conda_envs: Path, conda: conda_channel.Served, wheels: Path
) -> None:
    assert provision("env", "create", *flags, "--envs", conda_envs).returncode == 0
    prefix = tmp_path / "root/envs/diffusers"
    assert conda_pip_conflicts.mixed(prefix) == []
    write_wheel(wheels, "pip", "99.0", {"pip/__init__.py": ""})
    write_wheel(wheels, "fine", "1.0", {"fine.py": ""})
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-index", "--find-links", wheels]
    subprocess.run([*map(str, uv), "--python", str(prefix / "bin/python"), "pip==99.0", "fine"], check=True)
    pip = next(prefix.glob("conda-meta/pip-*.json"))
    version = json.loads(pip.read_text())["version"]
    assert conda_pip_conflicts.mixed(prefix) == [f"pip 99.0 of pip over conda's {version}"]
    assert "MIXED: pip 99.0 of pip over conda's" in provision("env", "list", *flags).stdout


def test_what_pip_gives_in_place_of_conda_is_seen(tmp_path: Path) -> None:
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
    assert conda_pip_conflicts.mixed(tmp_path) == ["numpy 2.0 of pip, which conda's scipy depends on"]


def test_environments_are_found_where_they_are_kept(
    tmp_path: Path, home: Path, base: Path, flags: list[object]
) -> None:
    for folder in (base / "envs/one", tmp_path / "dirs/two", tmp_path / "three"):
        (folder / "conda-meta").mkdir(parents=True)
    (base / "envs/one/file").write_bytes(b"x" * 1000)
    (home / ".condarc").write_text(f"envs_dirs: [{tmp_path / 'dirs'}]\n")
    (home / ".conda").mkdir()
    (home / ".conda/environments.txt").write_text(f"{tmp_path / 'three'}\n{tmp_path / 'gone'}\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / ".virtualenvs/four"], check=True)
    found = listed(*flags)
    assert set(found) == {"base", "one", "two", "three", "four"}
    assert (found["four"]["manager"], found["one"]["manager"]) == ("venv", "conda")
    assert found["one"]["activatable"] == "conda activate one"
    assert (found["one"]["size_bytes"], found["base"]["size_bytes"]) == (1000, 0), "base is counted without the others"
    assert not any(each["on_volume"] for each in found.values())


class TestLock:
    """`provision env lock`, against the channel and an index of a few wheels."""

    @pytest.fixture
    def mine(self, tmp_path: Path, envs: Path, wheels: Path) -> Path:
        write_wheel(wheels, "greet", "1.0", {"greet.py": "def main():\n    print('hello from pip')\n"})
        folder = envs / "mine"
        folder.mkdir()
        (folder / "environment.yml").write_text("channels: [conda-forge]\ndependencies:\n- python\n- hello\n")
        return folder

    def test_any_environment(
        self,
        tmp_path: Path,
        mine: Path,
        envs: Path,
        conda: conda_channel.Served,
        index: conda_channel.Served,
        flags: list[object],
    ) -> None:
        (mine / "requirements.in").write_text("greet\n")
        done = provision("env", "lock", "mine", "--envs", envs, "--platform", conda_channel.PLATFORM)
        assert done.returncode == 0, done.stderr
        written = ("conda-lock.yml", "requirements.lock", "witnesses.toml")
        assert done.stdout.split() == [str(mine / name) for name in written]
        packages = conda_lock.read_lock(mine / "conda-lock.yml")
        assert next((each.name, each.version) for each in packages) == ("hello", "2.0")
        assert all(each.url.startswith(conda_channel.CANONICAL) for each in packages)
        pip = (mine / "requirements.lock").read_text()
        assert "greet==1.0" in pip
        assert "http" not in pip
        made = provision("env", "create", "mine", *flags, "--envs", envs)
        assert made.returncode == 0, made.stdout + made.stderr
        assert "Python" in made.stdout
        ran = provision("env", "run", "--env", "mine", *flags, "--", "python", "-c", "import greet; greet.main()")
        assert ran.stdout.strip() == "hello from pip", ran.stderr
        again = (mine / "conda-lock.yml").read_text()
        assert provision("env", "lock", "mine", "--envs", envs).returncode == 0
        assert (mine / "conda-lock.yml").read_text() == again, "the same question, the same bytes"

    def test_what_is_not_locked_yet_is_told(self, mine: Path, envs: Path, flags: list[object]) -> None:
        done = provision("env", "create", "mine", *flags, "--envs", envs)
        assert done.returncode == 2
        assert "is not locked yet. Run `" in done.stderr

    def test_a_conda_part_alone_and_a_pip_section(
        self, mine: Path, envs: Path, conda: conda_channel.Served, index: conda_channel.Served, flags: list[object]
    ) -> None:
        assert provision("env", "lock", "mine", "--envs", envs, "--platform", conda_channel.PLATFORM).returncode == 0
        assert not (mine / "requirements.lock").exists()
        made = provision("env", "create", "mine", *flags, "--envs", envs)
        assert made.returncode == 0, made.stdout + made.stderr
        (mine / "environment.yml").write_text("dependencies:\n- python\n- pip:\n  - greet\n")
        assert provision("env", "lock", "mine", "--envs", envs).returncode == 0
        assert "greet==1.0" in (mine / "requirements.lock").read_text()

    @pytest.mark.parametrize(
        ("yml", "requirements", "told"),
        [
            (
                "dependencies:\n- numpy=2\n- pip:\n  - greet\n  - NumPy>=1\n",
                None,
                r"line 2 asks conda.*line 5 asks pip for NumPy>=1",
            ),
            (
                "dependencies:\n- python\n- greet\n",
                "# ours\ngreet==1.0\n",
                r"line 3 asks conda for greet.*line 2 asks pip",
            ),
            ("dependencies:\n- pip:\n  - greet\n", "greet\n", r"line 3: pip's packages stand in requirements.in too"),
            ("dependencies: 3\n", None, "no list of dependencies"),
            ("dependencys: []\n", None, "no list of dependencies"),
            ("name: [\n", None, "not valid YAML"),
            ("dependencies: []\nprefixes: 1\n", None, "line 2: unknown key prefixes"),
            ("dependencies: []\nplatforms: [amiga]\n", None, "unknown platform amiga"),
        ],
    )
    def test_a_mixed_or_wrong_spec_is_refused(
        self, mine: Path, envs: Path, yml: str, requirements: str | None, told: str
    ) -> None:
        (mine / "environment.yml").write_text(yml)
        if requirements:
            (mine / "requirements.in").write_text(requirements)
        done = provision("env", "lock", "mine", "--envs", envs, "--keep-conda")
        assert done.returncode == 2, done.stdout
        assert re.search(told, done.stderr), done.stderr
        assert "Traceback" not in done.stderr

    def test_pip_is_locked_to_what_conda_holds(
        self, mine: Path, envs: Path, index: conda_channel.Served, wheels: Path
    ) -> None:
        (mine / "requirements.in").write_text("greet\n")
        held = conda_lock.CondaPackage(
            "greet", "0.5", conda_channel.PLATFORM, "x/greet-0.5-0.conda", "0" * 32, "0" * 64, {"python": "*"}
        )
        (mine / "conda-lock.yml").write_text(conda_lock.lock_text([held], ["conda-forge"], ["environment.yml"]))
        with pytest.raises(FirstlightError, match=r"greet==0\.5"):
            write_locks.lock(envs, "mine", write_locks.LockHost(None, {}, [], keep_conda=True))

    def test_without_conda_conda_lock_is_not_even_started(self, mine: Path, envs: Path) -> None:
        done = provision("env", "lock", "mine", "--envs", envs, "--with", "conda-lock", env={"PATH": "/nonexistent"})
        assert done.returncode == 4, done.stderr
        assert "conda-lock needs one of conda, mamba, micromamba" in done.stderr

    def test_condas_own_tool_is_asked_for_condas_part(self, mine: Path, envs: Path, tmp_path: Path) -> None:
        """A conda-lock that writes a mirror's address, as the real one does, stands in: that one needs a real conda."""
        package = conda_lock.CondaPackage(
            "hello", "1", "linux-64", "M/conda-forge/noarch/hello-1-0.conda", "0" * 32, "0" * 64
        )
        answer = tmp_path / "answer"
        text = conda_lock.lock_text([package], ["conda-forge"], ["environment.yml"])
        answer.write_text(text.replace("url: M", "url: https://m.example"))
        programs = tmp_path / "bin"
        programs.mkdir()
        script = f'echo "$CONDA_EXE $@" > {tmp_path}/asked; cat "$3" >> {tmp_path}/asked; cp {answer} "$5"'
        for name, body in (("conda", "exit 0"), ("conda-lock", script)):
            (programs / name).write_text(f"#!/bin/sh\n{body}\n")
            (programs / name).chmod(0o755)
        (mine / "environment.yml").write_text("dependencies:\n- hello\n- pip:\n  - greet\n")
        changes = {"PATH": f"{programs}:{os.environ['PATH']}", "CONDA_CHANNEL_ALIAS": "https://m.example"}
        host = write_locks.LockHost(
            ["linux-64"], {"https://conda.anaconda.org/": "https://m.example/"}, [], tool="conda-lock"
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changes.items():
                patch.setenv(name, value)
            found = write_locks.solve_conda(mine, host)
        asked = (tmp_path / "asked").read_text()
        assert asked.startswith(f"{programs / 'conda'} lock --file ")
        assert "--platform linux-64" in asked
        assert '"dependencies": ["hello"]' in asked, "pip's part is not its business"
        assert [each.url for each in found] == [f"{conda_channel.CANONICAL}/noarch/hello-1-0.conda"]

    def test_a_flag_that_would_do_nothing_is_refused(self, mine: Path, envs: Path) -> None:
        done = provision("env", "lock", "mine", "--envs", envs, "--with", "conda-lock", "--virtual", "__cuda=12")
        assert (done.returncode, "--virtual is for rattler" in done.stderr) == (2, True)


def test_conda_lock_itself_reads_our_locks(tmp_path: Path) -> None:
    """The real parser of conda-lock 4, in the environment that its own lock pins."""
    folder = tmp_path / "interop"
    pinned = CHECKOUT / "envs/toolbox/interop.lock"
    from tests.conftest import MACHINE

    uv = [sys.executable, "-m", "uv"]
    settings = MACHINE | {"UV_CACHE_DIR": str(CHECKOUT / ".cache/uv"), "HOME": str(tmp_path)}
    from provision.installers import uv as uv_installer

    carried = uv_installer.for_uv(settings, CHECKOUT / ".cache/uv", offline=False).environment
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, folder], check=True, env=carried)
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
    subprocess.run([*uv, *map(str, install)], check=True, env=carried)
    code = "import sys; from pathlib import Path; from conda_lock.lockfile import parse_conda_lock_file as p; "
    code += "l = p(Path(sys.argv[1])); print(len(l.package), *sorted(l.metadata.platforms))"
    shipped = CHECKOUT / "envs/diffusers/conda-lock.yml"
    done = subprocess.run([folder / "bin/python", "-c", code, shipped], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["82", "linux-64", "osx-64", "osx-arm64", "win-64"]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda text: text.replace("sha256: '", "sha256: 'zz", 1), r"line 1\d: no pinned conda package"),
        (lambda text: text.replace("manager: conda", "manager: pip", 1), "no pinned conda package"),
        (lambda text: text.replace("version: 1\n", "version: 9\n", 1), "no conda-lock file of version 1"),
        (lambda _: "[1, 2", "not valid YAML"),
        (lambda _: "", "no conda-lock file of version 1"),
    ],
)
def test_a_corrupt_lock_is_named_with_its_line(tmp_path: Path, harm: Any, told: str) -> None:
    lock = tmp_path / "conda-lock.yml"
    lock.write_text(harm((CHECKOUT / "envs/diffusers/conda-lock.yml").read_text()))
    with pytest.raises(SpecError, match=told):
        conda_lock.read_lock(lock)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    packages = conda_lock.read_lock(CHECKOUT / "envs/diffusers/conda-lock.yml")
    text = conda_lock.lock_text(packages, ["conda-forge"], ["environment.yml"])
    assert text == (CHECKOUT / "envs/diffusers/conda-lock.yml").read_text()


def test_a_lock_of_ours_finds_nothing_under_an_empty_root(tmp_path: Path, home: Path) -> None:
    assert discover.environments(Root(tmp_path / "none"), home, {"PATH": ""}) == []
