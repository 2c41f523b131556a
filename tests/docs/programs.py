"""Checks names in a document: does the program have the command or flag, and the Makefile the target or variable?"""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer

from bench.cli import main as bench_cli
from provision.cli import main as provision_cli
from tests.conftest import CHECKOUT

APPS: dict[str, Any] = {
    "provision": typer.main.get_command(provision_cli.app),
    "bench": typer.main.get_command(bench_cli.app),
}
GROUPS = {name for name, command in APPS["provision"].commands.items() if hasattr(command, "commands")}
MAKEFILE = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
TARGETS = {"help", *re.findall(r"^([a-z_]+):", MAKEFILE, re.MULTILINE)}
VARIABLES = set(re.findall(r"^([A-Z]+) +\?=", MAKEFILE, re.MULTILINE)) | set(re.findall(r"\$\(([A-Z]+)\)", MAKEFILE))
# The flags that bench's pytest plugin and the examples define. The documents name no flag of pip or uv.
OTHER_FLAGS = set(
    re.findall(
        r"\"(--[a-z-]+)\"",
        "".join(
            (CHECKOUT / name).read_text(encoding="utf-8")
            for name in ("bench/pytest_plugin.py", "examples/squirrel.py", "examples/cat.py")
        ),
    )
)


def faults(line: str) -> list[str]:
    """Return a text for each command, flag, make target or make variable in a line of shell that does not exist.

    Words of programs other than make, provision and bench are not checked.
    """
    found = []
    for part in re.split(r"&&|\|\||;|\$\(|\)", line):
        words = shlex.split(part.replace('"', " "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if not words:
            continue
        program = words[0].removeprefix(".venv/bin/")
        if program == "make":
            found += _make_faults(words[1:])
        elif program in APPS:
            found += _app_faults(program, words[1:])
    return found


def span_faults(span: str) -> list[str]:
    """Return a text for each command, flag, make target or make variable in a code span that does not exist."""
    words = span.split()
    if words[0].removeprefix(".venv/bin/") in {"make", *APPS}:
        return faults(span)
    if words[0] in GROUPS and len(words) > 1:
        return faults(f"provision {span}")
    if re.match(r"--[a-z]", span):
        return [] if words[0].partition("=")[0] in every_flag() else [f"no command has {words[0]}"]
    variable = re.fullmatch(r"([A-Z]{2,})=\S+", span)
    if variable and variable[1] not in VARIABLES and not variable[1].startswith(("HF", "PIP", "UV", "NO")):
        return [f"the Makefile has no variable {variable[1]}"]
    return []


def every_flag() -> set[str]:
    """Return the flags of all commands of provision and bench, of the pytest plugin and of the examples."""
    flags = {"--help", *OTHER_FLAGS}
    pending = list(APPS.values())
    while pending:
        command = pending.pop()
        flags |= _flags(command)
        pending += getattr(command, "commands", {}).values()
    return flags


def _make_faults(words: list[str]) -> list[str]:
    found = []
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            found += [] if name in VARIABLES else [f"the Makefile has no variable {name}"]
        elif not word.startswith("-"):
            found += [] if word in TARGETS else [f"the Makefile has no target {word}"]
    return found


def _app_faults(program: str, words: list[str]) -> list[str]:
    command = APPS[program]
    path = program
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        name = words.pop(0)
        if name not in command.commands:
            return [f"{path} has no command {name}"]
        command, path = command.commands[name], f"{path} {name}"
    own = words[: words.index("--")] if "--" in words else words
    flags = _flags(command)
    return [
        f"{path} has no flag {word}" for word in own if word.startswith("-") and word.partition("=")[0] not in flags
    ]


def _flags(command: Any) -> set[str]:
    return {"--help"} | {
        name for param in command.params for name in (*param.opts, *param.secondary_opts) if name.startswith("-")
    }
