"""Builds steps of environments on the conda channel of the tests, and runs their programs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from provision.config.torch import Variant
from provision.core.layout import Root
from provision.environments.definition import EnvironmentDefinition
from provision.environments.step import EnvStep
from provision.lockfiles.folder import LockFolder
from provision.volume.journal import Journal
from tests.provision.conda_channel import MINOR, PLATFORM


def env_step(root: Path, envs: Path, *, interpreter: str = "auto", offline: bool = False) -> EnvStep:
    """Return the setup step of the environment diffusers, with the channel's packages and the wheels of the test."""
    locks, variants, minors = LockFolder(envs / "diffusers"), [Variant(name="cpu", torch="9.9+tiny")], [MINOR]
    definition = EnvironmentDefinition("diffusers", locks, variants, minors, interpreter, PLATFORM, "a test")
    return EnvStep(Root(root), definition, Path.home(), Journal(Root(root).journal), offline=offline)


def site_packages(step: EnvStep) -> Path:
    return next(step.prefix.glob("lib/python3*/site-packages"))


def output_of(*argv: object) -> str:
    """Run a program, and return its output without the last line break."""
    return subprocess.run(
        [str(argument) for argument in argv], capture_output=True, text=True, check=True
    ).stdout.strip()
