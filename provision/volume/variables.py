"""Stores environment variables on the volume, and sets them for child processes, shells and environments.

A variable is stored if neither a symbolic link nor a settings file can have the same effect. Each home on the
volume has its own variables.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provision.core.shell import fish_quoted, powershell_quoted, shell_quoted
from provision.fs import records
from provision.fs.atomic import write_atomic
from provision.volume.journal_acts import VariableChange
from provision.volume.owner import current

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from provision.core.layout import Root
    from provision.volume.journal import Journal
    from provision.volume.owner import Owner

# Schema 1 is one record for all homes, without an owner. A home reads it until it writes a record of its own.
SCHEMA = 2
# The variables that firstlight sets: those of `provision.host.tool_caches` and of `provision.mirrors.tools`.
NAMES = frozenset(
    {
        "CONDA_CHANNEL_ALIAS",
        "HF_DATASETS_CACHE",
        "HF_ENDPOINT",
        "HF_HUB_CACHE",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
        "HF_HUB_DISABLE_XET",
        "HF_MODULES_CACHE",
        "HF_XET_CACHE",
        "PIP_CACHE_DIR",
        "PIP_INDEX_URL",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_HOME",
        "TRITON_CACHE_DIR",
        "UV_CACHE_DIR",
        "UV_DEFAULT_INDEX",
    }
)
SHELLS = ("bash", "zsh", "fish", "powershell")


@dataclass(frozen=True)
class VariableGroup:
    """Name variables that are set together. If the user has set the variable `first`, none of the group is set.

    `at_start`: an environment's Python sets the variables when it starts.
    `at_activation`: the activation scripts of a conda environment set the variables.
    """

    first: str
    others: tuple[str, ...] = ()
    at_start: bool = False
    at_activation: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all variables of the group."""
        return (self.first, *self.others)

    def names_in(self, values: Mapping[str, str]) -> list[str]:
        """Return the names of the group's variables that are keys of `values`; none if `first` is not a key."""
        return [name for name in self.names if name in values] if self.first in values else []


def shell_file(root: Root, owner: Owner | None = None) -> Path:
    """Return the file with the variables of an owner, which a shell reads with `source`; default: this home's."""
    owner = owner or current(Path.home())
    host = re.sub(r"[^A-Za-z0-9.-]", "-", owner.host)
    return (
        root.variables / f"{host}-{hashlib.sha256(str(owner).encode('utf-8', 'surrogateescape')).hexdigest()[:12]}.sh"
    )


def read(root: Root, owner: Owner | None = None) -> dict[str, str]:
    """Return {variable: value} of an owner; default: of this home.

    An owner without a record has the values of the record without an owner, which an older version has written. An
    unreadable record counts as empty; the next write replaces it. A variable that is not in NAMES is ignored, since
    programs and shells could run its value.
    """
    record = shell_file(root, owner).with_suffix(".json")
    try:
        content = records.read_state(record if record.exists() else root.old_variables)
        values = records.texts(content["variables"])
        return {name: value for name, value in values.items() if name in NAMES}
    except (OSError, ValueError, KeyError):
        return {}


def set_value(root: Root, name: str, value: str | None, journal: Journal) -> None:
    """Store a variable of this home, or remove it if `value` is None, and record the change in the journal."""
    earlier = read(root)
    journal.record(VariableChange(name, value, earlier.get(name)))
    others = {key: text for key, text in earlier.items() if key != name}
    write(root, others | ({} if value is None else {name: value}))


def write(root: Root, values: dict[str, str], owner: Owner | None = None) -> None:
    """Replace the variables of an owner: its JSON record, and the file that a shell reads with `source FILE`."""
    owner = owner or current(Path.home())
    file = shell_file(root, owner)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "host": owner.host, "home": owner.home, "variables": values}
    write_atomic(file.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    # sh, bash, zsh and fish all understand `export NAME=VALUE`.
    text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(values.items()))
    write_atomic(file, text)


def for_child(root: Root, environ: Mapping[str, str], groups: Iterable[VariableGroup]) -> dict[str, str]:
    """Return this home's stored variables to add to the environment variables `environ` of a process, sorted by name.

    A group of `groups` is left out if `environ` has another value for the group's first variable.
    """
    values = read(root)
    for group in groups:
        if environ.get(group.first, "") not in {"", values.get(group.first)}:
            values = {name: value for name, value in values.items() if name not in group.names}
    return dict(sorted(values.items()))


def script(values: Mapping[str, str], shell: str) -> bytes:
    """Return a script that sets these variables in a shell.

    Args:
        values: {variable: value}; a value may have any bytes, as a path may.
        shell: the name of the shell, one of SHELLS.

    Returns:
        One line for each variable, in the order of `values`.
    """
    lines = []
    for name, value in values.items():
        variable = name.encode()
        if shell == "powershell":
            lines.append(b"$env:" + variable + b" = " + powershell_quoted(value).encode("utf-8", "surrogateescape"))
        elif shell == "fish":
            lines.append(b"set -gx " + variable + b" " + fish_quoted(value) + b";")
        else:
            lines.append(b"export " + variable + b"=" + shell_quoted(value))
    return b"".join(line + b"\n" for line in lines)


def start_line(values: Mapping[str, str], groups: Iterable[VariableGroup]) -> str:
    """Return the line of a .pth file by which Python sets the variables of groups when it starts; "" without variables.

    A group is not set if the user has set its first variable to a non-empty value. An empty value counts as unset, as
    in `hooks`, because huggingface_hub would build URLs without a host from it. Each further variable of the group is
    set only if the user has not set it.

    Python runs the line whenever it imports `site`: as a bare interpreter, with -I, in a notebook's kernel, from cron.
    So the line must be short and in ASCII, and must never raise an error.
    """
    parts = []
    for first, *others in filter(None, (group.names_in(values) for group in groups)):
        more = "".join(f', "{name}": os.environ.get("{name}", {values[name]!a})' for name in others)
        parts.append(f'os.environ.get("{first}") or os.environ.update({{"{first}": {values[first]!a}{more}}})')
    return f"import os; {'; '.join(parts)}\n" if parts else ""


def hooks(values: Mapping[str, str], groups: Iterable[VariableGroup]) -> list[tuple[str, str, str]]:
    """Return (folder, suffix, content) of each script that conda runs at activation or deactivation.

    The folder is "activate.d" or "deactivate.d", and the suffix that of the shell. Activation sets a group only if its
    first variable is unset or empty. Deactivation unsets a group only if its first variable has the value that
    activation sets.
    """
    enter, leave, enter_fish, leave_fish = "", "", "", ""
    for names in filter(None, (group.names_in(values) for group in groups)):
        first = names[0]
        quoted, fish = shlex.quote(values[first]), fish_quoted(values[first]).decode("utf-8", "surrogateescape")
        exports = "".join(f"  export {name}={shlex.quote(values[name])}\n" for name in names)
        enter += f'if [ -z "${{{first}-}}" ]; then\n{exports}fi\n'
        leave += f'if [ "${{{first}-}}" = {quoted} ]; then\n  unset {" ".join(names)}\nfi\n'
        sets = "".join(
            f"  set -gx {name} {fish_quoted(values[name]).decode('utf-8', 'surrogateescape')}\n" for name in names
        )
        enter_fish += f'if test -z "${first}"\n{sets}end\n'
        leave_fish += f'if test "${first}" = {fish}\n  set -e {" ".join(names)}\nend\n'
    return [
        ("activate.d", ".sh", enter),
        ("deactivate.d", ".sh", leave),
        ("activate.d", ".fish", enter_fish),
        ("deactivate.d", ".fish", leave_fish),
    ]
