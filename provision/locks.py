"""Writes an environment's locks with uv: every package by hash, no URL, so that any mirror can serve it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from provision import command, sources, spec

if TYPE_CHECKING:
    from provision.spec import Variant

_HEADER = "# Written by `make lock` from requirements.in and torch.toml: hashes, and no URLs. Do not edit.\n"
_TOOLBOX_PYTHON = "3.10"


def lock(envs: Path, name: str) -> list[Path]:
    """Write the locks of an environment: one for each variant of torch.toml; for the toolbox, its two.

    Args:
        envs: the folder that holds torch.toml and the environment's folder.
        name: the environment.

    Raises:
        SpecError: there is no such environment, or torch.toml is wrong.
        CommandError: uv could not resolve.
    """
    folder = envs / spec.choose(
        name, sorted(file.parent.name for file in envs.glob("*/requirements.in")), "environment"
    )
    if name == "toolbox":
        user, developer = folder / "requirements.in", folder / "dev.in"
        return [
            _write(folder / "requirements.lock", _compile([user], _TOOLBOX_PYTHON, None)),
            _write(folder / "dev.lock", _compile([user, developer], _TOOLBOX_PYTHON, None)),
        ]
    torch = spec.load(envs / "torch.toml", spec.TorchSpec)
    written = []
    for variant in torch.variant:
        with tempfile.TemporaryDirectory() as scratch:
            pin = Path(scratch) / "torch.in"
            pin.write_text(f"torch=={variant.torch}\n", encoding="utf-8")
            text = _compile([folder / "requirements.in", pin], torch.python[0], variant.find_links)
        written.append(_write(folder / f"{variant.name}.lock", add_hashes(text, variant)))
    return written


def _compile(inputs: list[Path], python: str, find_links: str | None) -> str:
    """Resolve for every platform and every Python from `python` on."""
    with tempfile.TemporaryDirectory() as scratch:
        env = sources.for_uv(os.environ, Path(scratch) / "cache", offline=False).environment
        # A lock has to list the hashes of every platform's wheels, so it is written from one whole index: what
        # this machine adds to it (a folder of a few wheels) would be taken for all there is.
        env.pop("UV_INDEX", None)
        if find_links is None:
            env.pop("UV_FIND_LINKS", None)
        else:
            env.setdefault("UV_FIND_LINKS", find_links)
        written = Path(scratch) / "lock"
        flags = ["--quiet", "--universal", "--generate-hashes", "--no-emit-index-url", "--no-annotate", "--no-header"]
        uv = sources.uv_binary()
        command.run([uv, "pip", "compile", *flags, "--python-version", python, *inputs, "-o", written], env=env)
        return written.read_text(encoding="utf-8")


def _write(target: Path, text: str) -> Path:
    target.write_text(_HEADER + text, encoding="utf-8")
    return target


def add_hashes(text: str, variant: Variant) -> str:
    """Give torch's entry the hashes of the builds for other Pythons, which only torch.toml knows."""
    lines = text.splitlines()
    wanted = f"torch=={variant.torch}"
    start = next((number for number, line in enumerate(lines) if line.split(" ")[0] == wanted), None)
    if start is None or not variant.hashes:
        return text
    end = start + 1
    while end < len(lines) and lines[end].startswith(" "):
        end += 1
    known = {line.strip(" \\").removeprefix("--hash=sha256:") for line in lines[start + 1 : end]}
    every = sorted(known | set(variant.hashes))
    entry = [f"{lines[start].rstrip(chr(92) + ' ')} \\"]
    entry += [f"    --hash=sha256:{digest} \\" for digest in every]
    entry[-1] = entry[-1].removesuffix(" \\")
    return "\n".join([*lines[:start], *entry, *lines[end:]]) + "\n"
