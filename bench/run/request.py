"""Defines the request of a run, the host that it uses, and the interface for its progress."""

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
    """Hold the options of a run.

    `interleave`: the two settings of a pair, such as "dtype=bf16,layout=channels_last".
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
    """Show a user which case of a run is measured, and its outcome."""

    def begin(self, line: str) -> None:
        """Show the line of a case that begins."""

    def update(self, line: Callable[[], str]) -> None:
        """Show the current activity; `line` is called only if its text is shown."""

    def report(self, line: str) -> None:
        """Show a line that stays."""


@dataclass(frozen=True)
class BenchHost:
    """Hold the root, the interpreter and the machine of a run."""

    root: Root
    python: Path
    machine: HostFacts
    envs: Path
