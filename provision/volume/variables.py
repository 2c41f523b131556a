"""Variables that do what a link or a file cannot: kept on the volume, for what we start and every shell that asks."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from provision.core.shell import fish_quoted, powershell_quoted, shell_quoted
from provision.fs.atomic import write_atomic
from provision.volume.journal_acts import VariableChange

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provision.core.layout import Root
    from provision.volume.journal import Journal

SCHEMA = 1
SHELLS = ("bash", "zsh", "fish", "powershell")
# The variables of mirrors, each with what is set along with it: here what the user has set himself goes before.
_WITH = {
    "PIP_INDEX_URL": (),
    "UV_DEFAULT_INDEX": (),
    "CONDA_CHANNEL_ALIAS": (),
    "HF_ENDPOINT": ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
}
OURS = tuple(name for first, others in _WITH.items() for name in (first, *others))


def kept(root: Root) -> dict[str, str]:
    """The variables of this volume; a record that cannot be read holds none, and is written anew."""
    try:
        found = json.loads(root.variables.with_suffix(".json").read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in found["variables"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep(root: Root, name: str, value: str | None, journal: Journal) -> None:
    """Add one, or drop it (None), and write the file that a POSIX shell, or fish, reads: `. FILE`, `source FILE`."""
    was = kept(root)
    journal.record(VariableChange(name, value, was.get(name)))
    others = {key: each for key, each in was.items() if key != name}
    write(root, others | ({} if value is None else {name: value}))


def write(root: Root, every: dict[str, str]) -> None:
    """Let these be the variables of the volume."""
    write_atomic(
        root.variables.with_suffix(".json"), json.dumps({"schema": SCHEMA, "variables": every}, indent=1) + "\n"
    )
    # `export NAME=VALUE` is what sh, bash, zsh and fish all read alike.
    text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(every.items()))
    write_atomic(root.variables, text)


def for_child(root: Root, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of this volume for a program that has this environment, sorted by name."""
    found = kept(root)
    for first, others in _WITH.items():
        if environ.get(first, "") not in {"", found.get(first)}:
            found = {name: value for name, value in found.items() if name not in {first, *others}}
    return dict(sorted(found.items()))


def script(every: Mapping[str, str], shell: str) -> bytes:
    """What a shell evaluates to have these variables.

    Args:
        every: in the order of the lines; values may hold any bytes, as paths do.
        shell: one of SHELLS.
    """
    lines = []
    for name, value in every.items():
        word = name.encode()
        if shell == "powershell":
            lines.append(b"$env:" + word + b" = " + powershell_quoted(value).encode("utf-8", "surrogateescape"))
        elif shell == "fish":
            lines.append(b"set -gx " + word + b" " + fish_quoted(value) + b";")
        else:
            lines.append(b"export " + word + b"=" + shell_quoted(value))
    return b"".join(line + b"\n" for line in lines)


def start_line(every: Mapping[str, str]) -> str:
    """Return the line of a .pth file by which python itself sets the hub's variables when it starts; "" without a hub.

    A value of the user's wins: where HF_ENDPOINT is set, nothing is. An empty HF_ENDPOINT counts as not set, as in
    `hooks`: the client of the hub would build addresses without a host from it. The others are set along with
    HF_ENDPOINT, each only where the user has not set it. Python runs the line in every start that runs `site` (a bare
    interpreter, -I, a notebook's kernel, cron), so it must be short, in ASCII, and never raise.
    """
    first = "HF_ENDPOINT"
    if first not in every:
        return ""
    others = "".join(f', "{name}": os.environ.get("{name}", {every[name]!a})' for name in _WITH[first] if name in every)
    return f'import os; os.environ.get("{first}") or os.environ.update({{"{first}": {every[first]!a}{others}}})\n'


def hooks(every: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(folder, suffix, text) of the scripts that conda runs when an environment is entered and left.

    They set what is not set yet, and take away only what they may have set.
    """
    groups = [(first, [name for name in (first, *_WITH[first]) if name in every]) for first in _WITH if first in every]
    enter, leave, enter_fish, leave_fish = "", "", "", ""
    for first, names in groups:
        told, ours = shlex.quote(every[first]), fish_quoted(every[first]).decode("utf-8", "surrogateescape")
        exports = "".join(f"  export {name}={shlex.quote(every[name])}\n" for name in names)
        enter += f'if [ -z "${{{first}-}}" ]; then\n{exports}fi\n'
        leave += f'if [ "${{{first}-}}" = {told} ]; then\n  unset {" ".join(names)}\nfi\n'
        sets = "".join(
            f"  set -gx {name} {fish_quoted(every[name]).decode('utf-8', 'surrogateescape')}\n" for name in names
        )
        enter_fish += f'if test -z "${first}"\n{sets}end\n'
        leave_fish += f'if test "${first}" = {ours}\n  set -e {" ".join(names)}\nend\n'
    return [
        ("activate.d", ".sh", enter),
        ("deactivate.d", ".sh", leave),
        ("activate.d", ".fish", enter_fish),
        ("deactivate.d", ".fish", leave_fish),
    ]
