"""Variables that do what a link or a file cannot: kept on the volume, for what we start and every shell that asks."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.shell import fish_quoted, powershell_quoted, shell_quoted
from provision.fs.atomic import write_atomic
from provision.volume.journal_acts import VariableChange

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from provision.core.layout import Root
    from provision.volume.journal import Journal

SCHEMA = 1
SHELLS = ("bash", "zsh", "fish", "powershell")


@dataclass(frozen=True)
class VariableGroup:
    """Name a variable, and `others` that are set along with it. Where the user has set `first`, none of them is set.

    `at_start`: python sets them when it starts in an environment. `at_activation`: conda sets them when it enters one.
    """

    first: str
    others: tuple[str, ...] = ()
    at_start: bool = False
    at_activation: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return every variable of the group."""
        return (self.first, *self.others)

    def held(self, every: Mapping[str, str]) -> list[str]:
        """Return the variables of the group that have a value; none where `first` has none."""
        return [name for name in self.names if name in every] if self.first in every else []


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


def for_child(root: Root, environ: Mapping[str, str], groups: Iterable[VariableGroup]) -> dict[str, str]:
    """The variables of this volume for a program that has this environment, sorted by name.

    A group of `groups` is left out where the environment has another value for its first variable.
    """
    found = kept(root)
    for group in groups:
        if environ.get(group.first, "") not in {"", found.get(group.first)}:
            found = {name: value for name, value in found.items() if name not in group.names}
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


def start_line(every: Mapping[str, str], groups: Iterable[VariableGroup]) -> str:
    """Return the line of a .pth file by which python itself sets variables when it starts; "" where there are none.

    A value of the user's wins: where the first variable of a group is set, nothing of the group is set. An empty value
    counts as not set, as in `hooks`: the client of the hub would build addresses without a host from it. The others are
    set along with the first one, each only where the user has not set it. Python runs the line in every start that runs
    `site` (a bare interpreter, -I, a notebook's kernel, cron), so it must be short, in ASCII, and never raise.
    """
    parts = []
    for first, *others in filter(None, (group.held(every) for group in groups)):
        more = "".join(f', "{name}": os.environ.get("{name}", {every[name]!a})' for name in others)
        parts.append(f'os.environ.get("{first}") or os.environ.update({{"{first}": {every[first]!a}{more}}})')
    return f"import os; {'; '.join(parts)}\n" if parts else ""


def hooks(every: Mapping[str, str], groups: Iterable[VariableGroup]) -> list[tuple[str, str, str]]:
    """(folder, suffix, text) of the scripts that conda runs when an environment is entered and left.

    They set what is not set yet, and take away only what they may have set.
    """
    enter, leave, enter_fish, leave_fish = "", "", "", ""
    for names in filter(None, (group.held(every) for group in groups)):
        first = names[0]
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
