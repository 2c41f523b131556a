"""Runs `provision` in the process of the test, which saves the start of an interpreter."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import pytest
import typer

from provision.cli import main
from tests.conftest import CHECKOUT

# `env run` replaces its process (exec), so it needs a process of its own.
REPLACES_ITS_PROCESS = ("env", "run")


def provision(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `provision` with arguments and added variables, and return its output and exit code."""
    argv = [str(word) for word in words]
    if tuple(argv[:2]) == REPLACES_ITS_PROCESS:
        return process(*argv, env=env)
    folder, streams = Path.cwd(), (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    duplicates = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, pytest.MonkeyPatch.context() as patch:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", encoding="utf-8") for number in (1, 2))
        try:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["provision", *argv])
            code = _run(argv)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.close()
            sys.stdout, sys.stderr = streams
            for number, duplicate in enumerate(duplicates, start=1):
                os.dup2(duplicate, number)
                os.close(duplicate)
            os.chdir(folder)
        return subprocess.CompletedProcess(argv, code, _read(out), _read(err))


def process(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `provision` in a child process, and return its output and exit code."""
    environment = dict(os.environ) | {"PYTHONPATH": str(CHECKOUT)} | (env or {})
    argv = [sys.executable, "-m", "provision", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, timeout=600)


@functools.cache
def _command() -> Any:
    """Build the tree of commands and flags once: it takes longer than most commands."""
    return typer.main.get_command(main.app)


def _run(argv: list[str]) -> int:
    try:
        _command()(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8")
