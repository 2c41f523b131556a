"""Tests the mirror variables in an environment: at each start of its Python, and after its activation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest

from provision.core.layout import Root
from provision.core.step import State
from provision.environments import installed_wheels
from provision.environments.remove import remove
from provision.installers import conda_settings, rattler
from provision.installers import uv as uv_installer
from provision.lockfiles import requirements
from provision.mirrors import chosen_mirrors, write_config
from provision.mirrors.chosen_mirrors import MirrorChoice, MirrorRecord, MirrorSource
from provision.mirrors.tools.hf import Hf
from provision.volume import environment_marker, variables
from provision.volume.journal import Journal
from tests.provision import conda_channel
from tests.provision.conftest import write_wheel
from tests.provision.http_server import index

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

HUB = "https://hub.example"
SHOW = "import os, json; print(json.dumps([os.environ.get(n) for n in {names!r}]))"
NAMES = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_IMPLICIT_TOKEN")
MIRROR_VALUES = [HUB, "1", "1"]


def record_of(hub: str = HUB, pip: str | None = None) -> MirrorRecord:
    """Return the record of a chosen hub mirror and, if `pip` is given, of a chosen index with that URL."""
    urls = {"hf": hub} | ({"pip": pip} if pip else {})
    return MirrorRecord(
        {
            tool: MirrorChoice("m", (MirrorSource("m", url), MirrorSource("official")), "by test")
            for tool, url in urls.items()
        }
    )


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path / "root")
    root.state.mkdir(parents=True)
    return root


@pytest.fixture(params=["venv", "conda"])
def env(request: pytest.FixtureRequest, root: Root, tmp_path: Path) -> Path:
    """Return the prefix of a real environment as EnvStep makes it: a venv, or conda packages of the test channel."""
    prefix = root.prefix("diffusers")
    if request.param == "venv":
        argv: list[str | Path] = [uv_installer.uv_binary(), "venv", "--quiet", "--python", sys.executable, prefix]
        subprocess.run(argv, check=True)
    else:
        channel = request.getfixturevalue("conda")
        lock = request.getfixturevalue("conda_envs") / "diffusers/conda-lock.yml"
        mirrored = {f"{conda_settings.CHANNELS}/": f"{channel.url}/"}
        rattler.install(lock, conda_channel.PLATFORM, prefix, root.pkgs, mirrored, final=prefix)
    interpreter = "conda" if request.param == "conda" else "system"
    (prefix / ".firstlight.json").write_text(json.dumps({"interpreter": interpreter, "prefix": str(prefix)}))
    return prefix


def settings_step(root: Root, home: Path) -> write_config.SettingsStep:
    prefix = root.prefix("diffusers")
    return write_config.SettingsStep(root, prefix, home, os.environ, Journal(root.journal, "t"), conda_is_here=False)


def choose_mirrors(root: Root, home: Path, record: MirrorRecord) -> None:
    """Write the chosen mirrors of a record to the volume, and apply the step that writes their settings."""
    earlier = chosen_mirrors.read(root)
    chosen_mirrors.write(root, MirrorRecord(record.choices, earlier.written if earlier else ()))
    settings_step(root, home).apply()
    assert settings_step(root, home).check().state is State.OK


def restore(root: Root) -> None:
    for step in write_config.restore_steps(root, Journal(root.journal, "t"), force=False):
        if step.check().state is State.DRIFTED:
            step.apply()
        assert step.check().state is State.OK


def json_output(argv: list[str | Path], environ: dict[str, str]) -> list[str | None]:
    """Run a program that prints a JSON list; return the list."""
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return list(json.loads(done.stdout))


def modes_and_contents(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def test_each_start_of_python_sets_the_mirror_variables_and_restore_returns_every_byte(
    env: Path, root: Root, home: Path
) -> None:
    before = modes_and_contents(env)
    choose_mirrors(root, home, record_of())
    show = SHOW.format(names=NAMES)
    python = env / "bin/python"
    empty: dict[str, str] = {}  # cron starts programs with almost no variables
    assert json_output([python, "-c", show], empty) == MIRROR_VALUES
    assert json_output([python, "-I", "-c", show], empty) == MIRROR_VALUES
    if (env / "bin/activate").exists():
        argv = ["bash", "-c", f'. {env}/bin/activate; python -c "$0"', show]
    else:
        argv = ["bash", "-c", f'export CONDA_PREFIX={env}; . {env}/etc/conda/activate.d/*.sh; {python} -c "$0"', show]
    assert json_output([*argv], {"PATH": os.environ["PATH"]}) == MIRROR_VALUES
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {show!r}], check=True)"
    assert json_output([python, "-c", child], empty) == MIRROR_VALUES, "a child process has the variables too"

    choose_mirrors(root, home, record_of("https://other.example"))
    assert json_output([python, "-c", show], empty) == ["https://other.example", "1", "1"]
    restore(root)
    assert json_output([python, "-c", show], empty) == [None, None, None]
    assert modes_and_contents(env) == before


def test_variable_that_the_user_has_set_goes_before_the_mirror_variable(env: Path, root: Root, home: Path) -> None:
    choose_mirrors(root, home, record_of())
    show: list[str | Path] = [env / "bin/python", "-c", SHOW.format(names=NAMES)]
    assert json_output(show, {"HF_ENDPOINT": "https://mine.example"}) == ["https://mine.example", None, None]
    assert json_output(show, {"HF_HUB_DISABLE_XET": "0"}) == [HUB, "0", "1"]
    assert json_output(show, {"HF_ENDPOINT": ""}) == MIRROR_VALUES, "an empty value counts as unset"


def test_deleted_pth_file_is_written_again_but_not_into_a_removed_environment(
    env: Path, root: Root, home: Path
) -> None:
    choose_mirrors(root, home, record_of())
    (line,) = env.glob("lib/python3*/site-packages/firstlight-mirrors.pth")
    line.unlink()
    assert settings_step(root, home).check().state is State.DRIFTED
    settings_step(root, home).apply()
    assert line.exists()
    remove(env, root, home, Journal(root.journal, "t"))
    restore(root)
    assert not env.exists(), "restore makes no file of a removed environment"


def test_choice_of_the_official_source_removes_every_file_from_the_environment(
    env: Path, root: Root, home: Path
) -> None:
    before = modes_and_contents(env)
    choose_mirrors(root, home, record_of())
    official = MirrorRecord({"hf": MirrorChoice("official", (MirrorSource("official"),), "by test")})
    choose_mirrors(root, home, official)
    assert modes_and_contents(env) == before


def test_pth_file_of_the_mirrors_does_not_count_as_damage_and_stays_after_an_uninstall(
    env: Path, root: Root, home: Path, tmp_path: Path
) -> None:
    wheel = write_wheel(tmp_path, "small", "1.0", {"small.py": "X = 1\n"})
    python = env / "bin/python"
    uv = str(uv_installer.uv_binary())
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel], check=True)
    choose_mirrors(root, home, record_of())
    (site,) = environment_marker.site_folders(env)
    assert harmed_packages(site) == {}
    subprocess.run([uv_installer.uv_binary(), "pip", "uninstall", "--quiet", "--python", python, "small"], check=True)
    assert (site / "firstlight-mirrors.pth").exists()


def harmed_packages(site: Path) -> dict[str, str]:
    return installed_wheels.damaged_packages(site, [requirements.LockedPackage("small", "1.0")], deep=True)


def test_huggingface_hub_in_the_environment_uses_the_chosen_hub_mirror(root: Root, home: Path) -> None:
    """Import the toolbox's real huggingface_hub with the environment's Python, and read its constants."""
    prefix = root.prefix("diffusers")
    subprocess.run([uv_installer.uv_binary(), "venv", "--quiet", "--python", sys.executable, prefix], check=True)
    (prefix / ".firstlight.json").write_text('{"interpreter": "system"}')
    choose_mirrors(root, home, record_of())
    show = "from huggingface_hub import constants as c; import json; "
    show += "print(json.dumps([c.ENDPOINT, c.HF_HUB_DISABLE_XET, c.HF_HUB_DISABLE_IMPLICIT_TOKEN]))"
    environ = {"PYTHONPATH": sysconfig.get_paths()["purelib"], "HOME": str(home)}
    assert json_output([prefix / "bin/python", "-c", show], environ) == [HUB, True, True]
    restore(root)
    assert json_output([prefix / "bin/python", "-c", show], environ) == ["https://huggingface.co", False, False]


def test_uv_in_the_activated_environment_installs_from_the_chosen_index(
    env: Path, root: Root, home: Path, tmp_path: Path, serve: Any
) -> None:
    """Activate the environment. In a venv, uv reads the mirror from the user's uv.toml instead of a variable."""
    mirror = serve(index([write_wheel(tmp_path, "hello", "1.0", {"hello.py": ""})]))
    choose_mirrors(root, home, record_of(pip=f"{mirror.url}/simple"))
    activate = env / "bin/activate"
    enter = f". {activate}" if activate.exists() else f". {env}/etc/conda/activate.d/firstlight-mirrors.sh"
    script = f"{enter}; {uv_installer.uv_binary()} pip install --quiet --reinstall --python {env}/bin/python hello"
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "UV_CACHE_DIR": str(tmp_path / "c")}
    subprocess.run(["bash", "-euc", script], env=environ, check=True)
    assert any("hello" in str(request) for request in mirror.seen)


def test_pth_file_has_one_ascii_line_of_python_for_any_mirror_address() -> None:
    values = {"HF_ENDPOINT": "https://hüb.example/\"'\\{}", "HF_HUB_DISABLE_XET": "1"}
    line = variables.start_line(values, Hf.variable_groups)
    assert line.isascii()
    assert line.count("\n") == 1
    assert line.startswith("import ")
    show = f"import os; os.environ.pop('HF_ENDPOINT', None); exec({line!r}); print(ascii(os.environ['HF_ENDPOINT']))"
    done = subprocess.run([sys.executable, "-I", "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii("https://hüb.example/\"'\\{}")
    assert variables.start_line({"UV_DEFAULT_INDEX": "https://x"}, Hf.variable_groups) == ""


def test_site_packages_folders_are_found_in_the_unix_and_the_windows_layout(tmp_path: Path) -> None:
    for folder in ("lib/python3.11/site-packages", "Lib/site-packages"):
        (tmp_path / "e" / folder).mkdir(parents=True)
    (tmp_path / "e/lib/python3.1").symlink_to("python3.11")  # conda's python package has this link
    folders = [
        folder.relative_to(tmp_path / "e").as_posix() for folder in environment_marker.site_folders(tmp_path / "e")
    ]
    assert folders == ["Lib/site-packages", "lib/python3.11/site-packages"]
