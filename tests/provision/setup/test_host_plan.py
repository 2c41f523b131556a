"""Tests that a command opens each file of the host definition at most once, and only files that the command needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision.conda_channel import FolderServer
    from tests.provision.fake_hub import FakeHub

# Runs `provision` with its own arguments; the last line of stderr lists every file that the process opened to read.
COUNTING = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and args[1] == "r" else None)
from provision.cli import main
try:
    main.app(sys.argv[1:])
finally:
    print("\\n" + json.dumps(opened), file=sys.stderr)
"""
OWN = {"host.toml", "mirrors.toml", "models.toml"}
TORCH = {"envs/torch.toml", "envs/diffusers/environment.yml"}
LISTS = {"mirrors.toml", "models.toml", "envs/mirrors.toml", "envs/models.toml"}
PROBE_FILES = "envs/diffusers/witnesses.toml"
LOCKS = {"envs/diffusers/cpu.lock", "envs/diffusers/conda-lock.yml", PROBE_FILES}


class Run(NamedTuple):
    """Hold the exit code of a command, and {file of the host definition: how often the command opened the file}."""

    code: int
    reads: dict[str, int]


@pytest.fixture
def flags(tmp_path: Path, conda_envs: Path, conda: FolderServer, hub: FakeHub) -> list[str]:
    """Return the flags of a host with conda packages; envs/ and the user's files each have one mirror and one model."""
    (conda_envs / "mirrors.toml").write_text('[pip.near]\nurl = "http://127.0.0.1:9"\n')
    (conda_envs / "models.toml").write_text(hub.manifest())
    (conda_envs / "diffusers/witnesses.toml").write_text("")
    (tmp_path / "mirrors.toml").write_text('[pip.own]\nurl = "http://127.0.0.1:9"\n')
    (tmp_path / "models.toml").write_text(hub.manifest("own"))
    lines = ['models = ["model"]', "relocate = []"]
    lines += [f'catalogue = "{tmp_path / "mirrors.toml"}"', f'manifest = "{tmp_path / "models.toml"}"']
    (tmp_path / "host.toml").write_text("\n".join(lines) + "\n")
    return ["--root", str(tmp_path / "root"), "--envs", str(conda_envs), "--host", str(tmp_path / "host.toml")]


def run(tmp_path: Path, *words: str) -> Run:
    argv = [sys.executable, "-c", COUNTING, *words]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    completed = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    opened = Counter(json.loads(completed.stderr.splitlines()[-1]))
    ours = {
        path.removeprefix(f"{tmp_path}/"): count for path, count in opened.items() if path.startswith(str(tmp_path))
    }
    return Run(
        completed.returncode, {path: count for path, count in ours.items() if path in OWN | TORCH | LISTS | LOCKS}
    )


def test_plan_setup_status_and_verify_open_each_file_of_the_host_definition_once(
    tmp_path: Path, flags: list[str]
) -> None:
    """Run setup, which selects mirrors, builds the environment from two locks, pulls a model, and checks all again."""
    # The test's settings name package servers, so that no mirror is probed and no probe file is read.
    unprobed = dict.fromkeys((OWN | TORCH | LISTS | LOCKS) - {PROBE_FILES}, 1)
    assert run(tmp_path, "plan", "--verbose", *flags) == (3, unprobed)
    assert run(tmp_path, "setup", "--quiet", *flags) == (0, unprobed)
    for command in ("status", "verify"):
        assert run(tmp_path, command, "--verbose", *flags) == (0, unprobed), command


@pytest.mark.parametrize("words", ["mirrors use auto", "mirrors probe", "mirrors probe --tool torch", "env create"])
def test_mirrors_and_env_commands_open_each_file_of_the_host_definition_once(
    tmp_path: Path, flags: list[str], words: str
) -> None:
    found = run(tmp_path, *words.split(), *flags)
    assert (found.code, set(found.reads.values())) == (0, {1})
    assert found.reads.keys() >= OWN | TORCH | {"envs/diffusers/cpu.lock"}
    assert (PROBE_FILES in found.reads) == words.startswith("mirrors probe")


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ("status", OWN | TORCH | LISTS),
        ("models list", {"host.toml", "models.toml", "envs/models.toml"}),
        ("mirrors list", {"host.toml", "mirrors.toml", "envs/mirrors.toml"}),
        ("doctor", {"host.toml"}),
        ("env where", {"host.toml"}),
        ("shellenv", {"host.toml"}),
        ("undo --list", {"host.toml"}),
    ],
)
def test_command_opens_only_the_files_of_the_host_definition_that_the_command_needs(
    tmp_path: Path, flags: list[str], words: str, needed: set[str]
) -> None:
    takes_envs = words in {"status", "models list", "mirrors list", "doctor"}
    for path in (TORCH | LISTS | LOCKS) - needed:
        (tmp_path / path).write_text("[broken")
    result = run(tmp_path, *words.split(), *(flags if takes_envs else [*flags[:2], *flags[4:]]))
    assert result.reads == dict.fromkeys(needed, 1)
    # No volume is set up, so `undo --list` is blocked.
    assert result.code in ({4} if words == "undo --list" else {0, 3})
