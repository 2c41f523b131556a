"""Variables that do what a link cannot: kept on the volume, for what we start and for every shell that asks."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from provision.volume import write_atomic

if TYPE_CHECKING:
    from provision.journal import Journal
    from provision.paths import Root

SCHEMA = 1


def kept(root: Root) -> dict[str, str]:
    """The variables of this volume; a record that cannot be read holds none, and is written anew."""
    try:
        found = json.loads(root.variables.with_suffix(".json").read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in found["variables"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep(root: Root, name: str, value: str, journal: Journal) -> None:
    """Add one, and write the file that a POSIX shell, or fish, reads: `. FILE`, `source FILE`."""
    journal.record("variable", name=name, value=value, was=kept(root).get(name))
    write(root, kept(root) | {name: value})


def write(root: Root, every: dict[str, str]) -> None:
    """Let these be the variables of the volume."""
    write_atomic(
        root.variables.with_suffix(".json"), json.dumps({"schema": SCHEMA, "variables": every}, indent=1) + "\n"
    )
    # `export NAME=VALUE` is what sh, bash, zsh and fish all read alike.
    text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(every.items()))
    write_atomic(root.variables, text)
