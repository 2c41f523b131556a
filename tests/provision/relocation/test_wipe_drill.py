"""Tests that `provision repair` restores a host after random parts of its home and volume are deleted."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from provision.cli.common import OutputOptions, resolve_host, run_steps
from provision.core.errors import Exit
from tests.provision import random_trees
from tests.provision.conftest import lock_text, write_wheel
from tests.provision.environments.conda_steps import env_step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.provision.conda_channel import FolderServer
    from tests.provision.fake_hub import FakeHub

# Saves a tiny model once. For each line of stdin it loads the model offline by the id of its repository.
LOADER = """
import sys
from diffusers import UNet2DModel
UNet2DModel(sample_size=8, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)).save_pretrained(sys.argv[1])
print("saved", flush=True)
for _ in sys.stdin:
    try:
        model = UNet2DModel.from_pretrained("owner/model", local_files_only=True)
        print("loaded", sum(p.numel() for p in model.parameters()), flush=True)
    except Exception as error:
        print("failed", " ".join(str(error).split())[:300], flush=True)
"""


@dataclass
class Host:
    """Describe a host in use: its home, root and host.toml, and the streams of a program that loads a model on it."""

    home: Path
    root: Path
    toml: Path
    envs: Path
    ask: IO[str]
    answer: IO[str]
    weights: int

    def command(self, name: str) -> Exit:
        plan = resolve_host(str(self.root), self.toml, self.envs, offline=True)
        return run_steps(name, plan, OutputOptions(json=False, quiet=False, verbose=False, no_color=True))

    def assert_works(self) -> None:
        for program in (self.root / "envs/diffusers/bin/greet", self.home / "miniconda3/envs/diffusers/bin/greet"):
            completed = subprocess.run([program], capture_output=True, text=True, check=False)
            assert completed.stdout == "hello from pip\n", completed.stderr
        self.ask.write("load\n")
        self.ask.flush()
        assert self.answer.readline() == f"loaded {self.weights}\n"


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Yield a new folder with a short path, because the #! line of a script may have at most 127 characters."""
    folder = Path(tempfile.mkdtemp(prefix="fl"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def host(
    short_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    conda_envs: Path,
    conda: FolderServer,
    wheels: Path,
    hub: FakeHub,
    measured_python: Path,
) -> Iterator[Host]:
    home, root = short_folder / "h", short_folder / "v"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SHELL", "/bin/bash")
    entry_points = "[console_scripts]\ngreet = greet:main\n"
    files = {
        "greet.py": "def main():\n    print('hello from pip')\n",
        "greet-1.0.dist-info/entry_points.txt": entry_points,
    }
    write_wheel(wheels, "greet", "1.0", files)
    (conda_envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))

    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "HF_ENDPOINT": "http://127.0.0.1:9"}
    argv: list[str | Path] = [measured_python, "-c", LOADER, short_folder / "model"]
    with subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as loader:
        assert loader.stdin is not None
        assert loader.stdout is not None
        assert loader.stdout.readline() == "saved\n"
        hub.files = {path.name: path.read_bytes() for path in (short_folder / "model").iterdir()}
        (conda_envs / "models.toml").write_text(hub.manifest())

        # The home before setup: a conda with an environment of the user, caches and settings.
        env_step(home / "miniconda3", conda_envs).apply()
        shutil.rmtree(home / "miniconda3/.firstlight")
        shutil.rmtree(home / "miniconda3/cache")
        (home / "miniconda3/conda-meta").mkdir()
        (home / ".cache/pip/http").mkdir(parents=True)
        (home / ".cache/pip/http/wheel").write_text("cached")
        (home / ".bashrc").write_text("alias x=y\n")
        (home / "work").mkdir()
        (home / "work/thesis").write_text("of years")
        toml = short_folder / "host.toml"
        toml.write_text(
            'models = ["model"]\nlogin = true\n'
            'relocate = ["huggingface", "conda", "pip", "uv", "torch", {path = "~/work", to = "work"}]\n'
        )
        plan = resolve_host(str(root), toml, conda_envs)
        assert (
            run_steps("setup", plan, OutputOptions(json=False, quiet=True, verbose=False, no_color=True)) is Exit.GOOD
        )
        hub.faults["status"] = 503
        drilled = Host(home, root, toml, conda_envs, loader.stdin, loader.stdout, 0)
        drilled.ask.write("load\n")
        drilled.ask.flush()
        drilled.weights = int(drilled.answer.readline().split()[1])
        drilled.assert_works()
        yield drilled
        loader.stdin.close()


def damage_host(host: Host, generator: random.Random) -> str:  # noqa: C901 (one branch for each kind of damage)
    """Damage the host at random, as providers, people and programs do, and return the kind of damage."""
    repo = host.root / "cache/huggingface/hub/models--owner--model"
    damage = generator.choice(["all", "some", "some", "came back", "refs", "snapshots", "some snapshots"])
    if damage == "all":
        for path in host.home.iterdir():
            remove(path)
    elif damage == "some":
        paths = [path for path in host.home.rglob("*") if len(path.relative_to(host.home).parts) <= 4]
        for path in random_part(paths, generator):
            if os.path.lexists(path) and path.parent.resolve().is_relative_to(host.home):
                remove(path)
    elif damage == "came back":
        for path in random_part([path for path in host.home.rglob("*") if path.is_symlink()], generator):
            if path.is_symlink():
                path.unlink()
                path.mkdir()
                (path / f"new {generator.randrange(10**9)}").write_text("since the wipe")
    elif damage == "some snapshots":
        for path in random_part([path for path in (repo / "snapshots").rglob("*") if path.is_symlink()], generator):
            path.unlink()
    else:
        remove(repo / damage)
    return damage


def random_part(paths: list[Path], generator: random.Random) -> list[Path]:
    return generator.sample(sorted(paths), generator.randint(1, len(paths)))


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize("times", [15, pytest.param(200, marks=pytest.mark.long)])
def test_repair_restores_a_randomly_damaged_host_to_working_order_each_time(
    host: Host, times: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert host.command("status") is Exit.GOOD, capfd.readouterr().out
    generator = random.Random(11)  # noqa: S311 (it selects the damage, and needs no secrecy)
    work_before = random_trees.contents(host.root / "work")
    for drill in range(times):
        damage = damage_host(host, generator)
        paths_before = {
            path
            for path in (host.root / "conda", host.root / "work", host.root / "cache/pip")
            for path in path.rglob("*")
        }
        added = {path.name: path for path in host.home.rglob("new *")}
        if generator.random() < 0.3:
            script = host.root / ".firstlight/relink.sh"
            assert subprocess.run(["sh", script, "-q"], check=False).returncode in {0, 3}
        repaired = host.command("repair")
        output = capfd.readouterr()
        assert repaired is Exit.GOOD, f"{drill}: {damage}\n{output.out}\n{output.err}"
        assert host.command("status") is Exit.GOOD, f"{drill}: {damage}\n{capfd.readouterr().out}"
        host.assert_works()
        assert (host.home / "work/thesis").read_text() == "of years"
        assert (host.home / ".cache/pip/http/wheel").read_text() == "cached"
        assert b"relink.sh" in (host.home / ".bashrc").read_bytes()
        assert all(os.path.lexists(path) for path in paths_before)
        merged = {path.name for path in host.root.rglob("new *")}
        assert not [path for name, path in added.items() if name not in merged], "new files are merged"
    assert work_before.items() <= random_trees.contents(host.root / "work").items()
    print(f"{times} drills")
