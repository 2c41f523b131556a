"""Defines the options of a run, the host that it uses, and the interface that shows its progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from provision.core.layout import Root
    from provision.host.facts import HostFacts


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """Hold the options of `bench run`, `bench tune` and `bench validate`.

    `out`: the folder of all runs. `python`: the measured interpreter. `root`, `host`, `envs`: as the flags of
    `provision`. `models`, `dtypes`: keep only these; empty keeps all. `interleave`: the two settings of a pair, such as
    ("dtype=fp32", "dtype=bf16,layout=channels_last"). `changes`: settings "axis=value" for every case. `in_process`:
    measure in this process, for a debugger. `command`: the command that repeats the run.
    """

    suite: str
    out: Path
    device: str = "auto"
    python: Path | None = None
    root: str | None = None
    host: Path | None = None
    envs: Path | None = None
    budget_seconds: float | None = None
    models: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    find_max: bool = False
    interleave: tuple[str, str] | None = None
    changes: tuple[str, ...] = ()
    in_process: bool = False
    command: str | None = None


class Progress(Protocol):
    """Show the user which case of a run is measured, and its outcome."""

    def begin(self, line: str) -> None:
        """Show that the case of this line begins."""

    def update(self, line: Callable[[], str]) -> None:
        """Show the present activity instead of the last one; `line` is called only if its text is shown."""

    def report(self, line: str) -> None:
        """Show a line that stays on the screen."""


@dataclass(frozen=True)
class BenchHost:
    """Hold the root, the measured interpreter, the facts of the machine, and the folder `envs`."""

    root: Root
    python: Path
    machine: HostFacts
    envs: Path
