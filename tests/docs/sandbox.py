"""Builds a checkout in which the documents' commands run quickly: small packages, and a hub with small models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.run import store
from tests.bench.conftest import a_run
from tests.bench.validation_samples import validated
from tests.conftest import CHECKOUT
from tests.provision import hub_server
from tests.provision.conftest import DIFFUSERS, TORCH, lock_text, write_wheel

if TYPE_CHECKING:
    from pathlib import Path

    from tests.provision.http_server import Server

SD, XL, CAT = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl", "google/ddpm-cat-256"
TORCH_TOML = """\
python = ["3.10", "3.11", "3.12", "3.13", "3.14"]
[[variant]]
name = "cpu"
torch = "9.9+tiny"
[[variant]]
name = "cu128"
torch = "9.9+tiny"
"""


@dataclass(frozen=True)
class Sandbox:
    """Holds a copy of the checkout whose `.venv` runs the copied code, and its temporary home and volume."""

    checkout: Path
    home: Path
    volume: Path
    environment: dict[str, str]

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line of shell in the copied checkout; stdin is /dev/null."""
        return subprocess.run(
            ["sh", "-c", line],
            cwd=self.checkout,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )


def build(folder: Path, home: Path, hub: Server, pipelines: dict[str, Path]) -> Sandbox:
    """Build the copied checkout, its toolbox, a stored run, a stored validation, and a folder of the user in the home.

    Args:
        folder: an empty folder.
        home: the temporary home.
        hub: a server on loopback in place of the model hub; this function adds the models to it.
        pipelines: {"sd": folder of a saved pipeline, "ddpm": folder of another one}.
    """
    checkout, volume = folder / "checkout", folder / "data"
    checkout.mkdir(parents=True)
    for name in ("provision", "bench", "envs", "examples", "docs"):
        shutil.copytree(CHECKOUT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "Makefile", checkout)
    (checkout / "host.toml").write_text("models = []\n")
    (checkout / "train.py").write_text("import torch\n")
    _toolbox(checkout)
    _environment(checkout / "envs", folder / "wheels")
    _models(checkout / "envs/models.toml", hub, pipelines)
    (home / "work").mkdir()
    (home / "work/notes.txt").write_text("mine\n")
    for run in (a_run(suite="quick"), validated(1)):
        store.keep(run, checkout / "results" / run.id)
    path = os.pathsep.join((str(checkout / ".venv/bin"), os.environ["PATH"]))
    return Sandbox(
        checkout,
        home,
        volume,
        # With PYTHON=true, make skips the bootstrap, which tests/provision/test_bootstrap.py runs.
        dict(os.environ)
        | {"HOME": str(home), "PATH": path, "PYTHON": "true", "SHELL": "/bin/bash", "HF_ENDPOINT": hub.url}
        | {"PIP_FIND_LINKS": str(folder / "wheels"), "PIP_NO_INDEX": "1"},
    )


def _toolbox(checkout: Path) -> None:
    """Make a `.venv` that imports this checkout's code and the packages of the toolbox that runs the tests."""
    subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    programs = checkout / ".venv/bin"
    (site,) = (checkout / ".venv").glob("lib/python*/site-packages")
    (site / "sandbox.pth").write_text(f"{checkout}\n{sysconfig.get_path('purelib')}\n")
    (programs / "uv").symlink_to(f"{sysconfig.get_path('scripts')}/uv")
    for module in ("provision", "bench", "pytest"):
        (programs / module).write_text(f'#!/bin/sh\nexec "{programs}/python" -I -m {module} "$@"\n')
        (programs / module).chmod(0o755)


def _environment(envs: Path, wheels: Path) -> None:
    """Replace the environment definition by one with two small packages, for the variants cpu and cu128."""
    wheels.mkdir()
    write_wheel(wheels, "torch", "9.9+tiny", {"torch/__init__.py": TORCH})
    write_wheel(wheels, "diffusers", "8.8", {"diffusers/__init__.py": DIFFUSERS})
    shutil.rmtree(envs / "diffusers")
    (envs / "diffusers").mkdir()
    for variant in ("cpu", "cu128"):
        (envs / "diffusers" / f"{variant}.lock").write_text(lock_text(*sorted(wheels.glob("*.whl"))))
    (envs / "torch.toml").write_text(TORCH_TOML)


def _models(manifest: Path, hub: Server, pipelines: dict[str, Path]) -> None:
    """Write a manifest of small models under the names of the shipped models, and add their files to the hub."""
    every = hub_server.files_of(pipelines["sd"])
    default = {path: content for path, content in every.items() if ".fp16." not in path}
    lean = {path: content for path, content in every.items() if ".fp16." in path or ".safetensors" not in path}
    cat = hub_server.files_of(pipelines["ddpm"])
    text = hub_server.manifest_entry("stable-diffusion-v1-5", SD, default)
    text += hub_server.manifest_entry('"stable-diffusion-v1-5@fp16"', SD, lean, variant="fp16")
    text += hub_server.manifest_entry("stable-diffusion-xl", XL, default)
    text += hub_server.manifest_entry("ddpm-cat-256", CAT, cat)
    manifest.write_text(text)
    hub_server.add(hub, SD, every)
    hub_server.add(hub, CAT, cat)
