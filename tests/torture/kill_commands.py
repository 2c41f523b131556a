"""Runs `provision` as one of two hosts by kill_server.py, with a small environment and a small model."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.provision import hub_server
from tests.provision.conftest import DIFFUSERS, TORCH, lock_text, write_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator

REPO = "owner/model"
FILES = {
    "model_index.json": b'{"_class_name": "X"}\n',
    "unet/model.safetensors": random.Random(1).randbytes(40_000),  # noqa: S311 (weights, not secrets)
}


class Commands:
    """Holds a process of kill_server.py, which runs commands and may kill them; the caller ends it by `close`."""

    def __init__(self, base: Path, library: Path, hub: str) -> None:
        self.base = base
        self.wheels = base / "wheels"
        self.wheels.mkdir()
        write_wheel(self.wheels, "torch", "9.9+tiny", {"torch/__init__.py": TORCH})
        write_wheel(self.wheels, "diffusers", "8.8", {"diffusers/__init__.py": DIFFUSERS})
        environ = dict(os.environ) | {"PIP_FIND_LINKS": str(self.wheels), "PIP_NO_INDEX": "1", "HF_ENDPOINT": hub}
        environ |= {"LD_PRELOAD": str(library), "SHELL": "/bin/bash"}
        argv = [sys.executable, "-I", "-B", str(Path(__file__).with_name("kill_server.py"))]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, start_new_session=True
        )

    def run(self, host: str, home: Path, *words: object, **kill: int) -> Ended:
        """Run `provision` with `words` as a host, and return how it ended.

        Args:
            host: the host name of the command.
            home: its home.
            words: its arguments.
            kill: at=N kills it before its Nth counted call (killer.c), after=N after N nanoseconds; {} does not.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        out = self.base / "output"
        request = {"host": host, "home": str(home), "argv": [*map(str, words)], "out": str(out), **kill}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        return Ended(reply["code"], reply["calls"], out.read_text(errors="replace"))

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass(frozen=True)
class Ended:
    """Hold how a command ended: exit code (-N: by signal N), number of counted calls (0 if killed), and output."""

    code: int
    calls: int
    output: str

    @property
    def is_killed(self) -> bool:
        return self.code == -signal.SIGKILL


def write_definitions(base: Path, wheels: Path) -> None:
    """Write envs/ with one environment and one model, host.toml, and first.toml, which relocates and pulls nothing."""
    envs = base / "envs"
    (envs / "diffusers").mkdir(parents=True)
    minors = '["3.10", "3.11", "3.12", "3.13", "3.14"]'
    (envs / "torch.toml").write_text(f'python = {minors}\n[[variant]]\nname = "cpu"\ntorch = "9.9+tiny"\n')
    (envs / "models.toml").write_text(hub_server.manifest_entry("m", REPO, FILES))
    (envs / "diffusers/cpu.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    (base / "host.toml").write_text('models = ["m"]\nrelocate = ["huggingface"]\nmirror = "keep"\n')
    (base / "first.toml").write_text('models = []\nrelocate = []\nmirror = "keep"\n')


def all_below(*tops: Path) -> Iterator[str]:
    """Yield the paths of the folders `tops` that exist, and of all entries below them; links are not followed."""
    for top in tops:
        if os.path.lexists(top):
            yield str(top)
        for folder, names, files in os.walk(top):
            for name in (*names, *files):
                yield f"{folder}/{name}"


def files_below(top: Path) -> Iterator[str]:
    """Yield the paths of the regular files below a folder; links are not followed."""
    return (path for path in all_below(top) if stat.S_ISREG(os.lstat(path).st_mode))
