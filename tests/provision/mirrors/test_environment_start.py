"""The chosen mirror is in force wherever the environment's python runs: bare, isolated, activated, from cron."""

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
from provision.mirrors import record as mirror_record
from provision.mirrors import write_config
from provision.mirrors.record import MirrorChoice, MirrorRecord, MirrorSource
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
OURS = [HUB, "1", "1"]


def chosen(hub: str = HUB, pip: str | None = None) -> MirrorRecord:
    named = {"hf": hub} | ({"pip": pip} if pip else {})
    return MirrorRecord(
        {
            tool: MirrorChoice("m", (MirrorSource("m", url), MirrorSource("official")), "by test")
            for tool, url in named.items()
        }
    )


@pytest.fixture
def root(tmp_path: Path) -> Root:
    found = Root(tmp_path / "root")
    found.state.mkdir(parents=True)
    return found


@pytest.fixture(params=["venv", "conda"])
def env(request: pytest.FixtureRequest, root: Root, tmp_path: Path) -> Path:
    """A real environment as EnvStep leaves it: uv's venv, or conda's from the tests' channel."""
    place = root.prefix("diffusers")
    if request.param == "venv":
        argv: list[str | Path] = [uv_installer.uv_binary(), "venv", "--quiet", "--python", sys.executable, place]
        subprocess.run(argv, check=True)
    else:
        served = request.getfixturevalue("conda")
        lock = request.getfixturevalue("conda_envs") / "diffusers/conda-lock.yml"
        mirrored = {f"{conda_settings.CHANNELS}/": f"{served.url}/"}
        rattler.install(lock, conda_channel.PLATFORM, place, root.pkgs, mirrored, final=place)
    kind = "conda" if request.param == "conda" else "system"
    (place / ".firstlight.json").write_text(json.dumps({"interpreter": kind, "prefix": str(place)}))
    return place


def step(root: Root, home: Path) -> write_config.SettingsStep:
    place = root.prefix("diffusers")
    return write_config.SettingsStep(root, place, home, os.environ, Journal(root.journal, "t"), conda_is_here=False)


def use(root: Root, home: Path, record: MirrorRecord) -> None:
    known = mirror_record.read(root)
    mirror_record.write(root, MirrorRecord(record.choices, known.written if known else ()))
    step(root, home).apply()
    assert step(root, home).check().state is State.OK


def restore(root: Root) -> None:
    for each in write_config.restoring(root, Journal(root.journal, "t"), force=False):
        if each.check().state is State.DRIFTED:
            each.apply()
        assert each.check().state is State.OK


def seen_by(argv: list[str | Path], environ: dict[str, str]) -> list[str | None]:
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return list(json.loads(done.stdout))


def files_of(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def test_every_start_of_its_python_has_the_mirror_and_restore_leaves_no_trace(
    env: Path, root: Root, home: Path
) -> None:
    before = files_of(env)
    use(root, home, chosen())
    show = SHOW.format(names=NAMES)
    python = env / "bin/python"
    bare: dict[str, str] = {}  # as cron starts it
    assert seen_by([python, "-c", show], bare) == OURS
    assert seen_by([python, "-I", "-c", show], bare) == OURS
    if (env / "bin/activate").exists():
        words = ["bash", "-c", f'. {env}/bin/activate; python -c "$0"', show]
    else:
        words = ["bash", "-c", f'export CONDA_PREFIX={env}; . {env}/etc/conda/activate.d/*.sh; {python} -c "$0"', show]
    assert seen_by([*words], {"PATH": os.environ["PATH"]}) == OURS
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {show!r}], check=True)"
    assert seen_by([python, "-c", child], bare) == OURS, "what it starts has it too"

    use(root, home, chosen("https://other.example"))
    assert seen_by([python, "-c", show], bare) == ["https://other.example", "1", "1"]
    restore(root)
    assert seen_by([python, "-c", show], bare) == [None, None, None]
    assert files_of(env) == before


def test_a_value_of_the_users_wins(env: Path, root: Root, home: Path) -> None:
    use(root, home, chosen())
    show: list[str | Path] = [env / "bin/python", "-c", SHOW.format(names=NAMES)]
    assert seen_by(show, {"HF_ENDPOINT": "https://mine.example"}) == ["https://mine.example", None, None]
    assert seen_by(show, {"HF_HUB_DISABLE_XET": "0"}) == [HUB, "0", "1"]
    assert seen_by(show, {"HF_ENDPOINT": ""}) == OURS, "empty is not set, as in the scripts of conda"


def test_an_environment_that_is_made_anew_gets_it_again(env: Path, root: Root, home: Path) -> None:
    use(root, home, chosen())
    (line,) = env.glob("lib/python3*/site-packages/firstlight-mirrors.pth")
    line.unlink()
    assert step(root, home).check().state is State.DRIFTED
    step(root, home).apply()
    assert line.exists()
    remove(env, root, home, Journal(root.journal, "t"))
    restore(root)
    assert not env.exists(), "nothing of an environment that is gone is made by a restore"


def test_official_again_takes_it_out(env: Path, root: Root, home: Path) -> None:
    before = files_of(env)
    use(root, home, chosen())
    official = MirrorRecord({"hf": MirrorChoice("official", (MirrorSource("official"),), "by test")})
    use(root, home, official)
    assert files_of(env) == before


def test_the_packages_are_not_disturbed(env: Path, root: Root, home: Path, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "small", "1.0", {"small.py": "X = 1\n"})
    python = env / "bin/python"
    uv = str(uv_installer.uv_binary())
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel], check=True)
    use(root, home, chosen())
    (site,) = environment_marker.site_folders(env)
    assert harmed(site) == {}
    subprocess.run([uv_installer.uv_binary(), "pip", "uninstall", "--quiet", "--python", python, "small"], check=True)
    assert (site / "firstlight-mirrors.pth").exists()


def harmed(site: Path) -> dict[str, str]:
    return installed_wheels.harmed_packages(site, [requirements.LockedPackage("small", "1.0")], deep=True)


def test_the_hubs_own_client_asks_the_mirror(root: Root, home: Path) -> None:
    """The real huggingface_hub, as the toolbox has it, read by the environment's python."""
    place = root.prefix("diffusers")
    subprocess.run([uv_installer.uv_binary(), "venv", "--quiet", "--python", sys.executable, place], check=True)
    (place / ".firstlight.json").write_text('{"interpreter": "system"}')
    use(root, home, chosen())
    show = "from huggingface_hub import constants as c; import json; "
    show += "print(json.dumps([c.ENDPOINT, c.HF_HUB_DISABLE_XET, c.HF_HUB_DISABLE_IMPLICIT_TOKEN]))"
    environ = {"PYTHONPATH": sysconfig.get_paths()["purelib"], "HOME": str(home)}
    assert seen_by([place / "bin/python", "-c", show], environ) == [HUB, True, True]
    restore(root)
    assert seen_by([place / "bin/python", "-c", show], environ) == ["https://huggingface.co", False, False]


def test_uv_in_the_activated_environment_asks_the_mirror(
    env: Path, root: Root, home: Path, tmp_path: Path, play: Any
) -> None:
    """A venv's bin/activate is uv's own file: there uv reads the user's uv.toml, which names the mirror."""
    mirror = play(index([write_wheel(tmp_path, "hello", "1.0", {"hello.py": ""})]))
    use(root, home, chosen(pip=f"{mirror.url}/simple"))
    activate = env / "bin/activate"
    enter = f". {activate}" if activate.exists() else f". {env}/etc/conda/activate.d/firstlight-mirrors.sh"
    script = f"{enter}; {uv_installer.uv_binary()} pip install --quiet --reinstall --python {env}/bin/python hello"
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "UV_CACHE_DIR": str(tmp_path / "c")}
    subprocess.run(["bash", "-euc", script], env=environ, check=True)
    assert any("hello" in str(asked) for asked in mirror.seen)


def test_the_line_is_one_of_python_in_ascii_for_any_address() -> None:
    values = {"HF_ENDPOINT": "https://hüb.example/\"'\\{}", "HF_HUB_DISABLE_XET": "1"}
    line = variables.start_line(values, Hf.variable_groups)
    assert line.isascii()
    assert line.count("\n") == 1
    assert line.startswith("import ")
    show = f"import os; os.environ.pop('HF_ENDPOINT', None); exec({line!r}); print(ascii(os.environ['HF_ENDPOINT']))"
    done = subprocess.run([sys.executable, "-I", "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii("https://hüb.example/\"'\\{}")
    assert variables.start_line({"UV_DEFAULT_INDEX": "https://x"}, Hf.variable_groups) == ""


def test_both_layouts_of_an_environment_are_known(tmp_path: Path) -> None:
    for inside in ("lib/python3.11/site-packages", "Lib/site-packages"):
        (tmp_path / "e" / inside).mkdir(parents=True)
    (tmp_path / "e/lib/python3.1").symlink_to("python3.11")  # as conda's python has it
    found = [
        folder.relative_to(tmp_path / "e").as_posix() for folder in environment_marker.site_folders(tmp_path / "e")
    ]
    assert found == ["Lib/site-packages", "lib/python3.11/site-packages"]
