"""What the commands of `bench` share: their flags, their progress, and how each ends."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.core.errors import BYTES_FOR_A_RUN
from provision.core import command_end
from provision.core.errors import FirstlightError, SpecError, from_os_error
from provision.core.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.errors import Exit

OutFlag = Annotated[Path, typer.Option("--out", help="Where runs are kept.", metavar="DIR")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
NoColorFlag = Annotated[bool, typer.Option("--no-color", help="No colours (as NO_COLOR).")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="No progress.")]
DeviceFlag = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
PythonFlag = Annotated[Path | None, typer.Option("--python", help="Measure this interpreter.")]
RootFlag = Annotated[str | None, typer.Option("--root", help="The persistent folder.", metavar="DIR")]
HostFlag = Annotated[Path | None, typer.Option("--host", help="What this host has.", metavar="FILE")]
EnvsFlag = Annotated[Path | None, typer.Option("--envs", help="Another envs/ folder.", metavar="DIR")]
OUT = Path("results")
_REDRAW_SECONDS, _LINE_SECONDS = 1.0, 10.0


def _print_version(is_given: bool) -> None:
    """Print the version and end, if --version is given."""
    if is_given:
        print(f"bench {VERSION}")
        raise typer.Exit


VersionFlag = Annotated[
    bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
]


def said() -> str:
    """The command as it was typed, or as make typed it."""
    words = shlex.join(["bench", *sys.argv[1:]])
    # What is no character is shown by its number: a name in the shell may hold any byte, a run's file may not.
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


class Progress:
    """Shows a run on stderr: a line a case; meanwhile what is being done, redrawn once a second at most.

    Without a terminal that is a line each ten seconds. It is drawn where the parent wakes anyway (at a line of the
    worker, and twice a second), so that drawing takes no time from what is measured. A terminal that goes away ends
    the showing, not the run.
    """

    def __init__(self, *, quiet: bool, now: Callable[[], float] = time.monotonic) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._now = now
        self._shown = now()

    def begin(self, line: str) -> None:
        """A case begins."""
        if self.terminal:
            self._write(f"\r\x1b[K{self._cut(f'{line} …')}")
            self._shown = self._now()

    def at(self, line: Callable[[], str]) -> None:
        """Something is being done; the line is made where it is shown."""
        if self.quiet or self._now() - self._shown < (_REDRAW_SECONDS if self.terminal else _LINE_SECONDS):
            return
        self._shown = self._now()
        self._write(f"\r\x1b[K{self._cut(line())}" if self.terminal else f"{line()}\n")

    def say(self, line: str) -> None:
        """Something is known."""
        self._shown = self._now()
        self._write(f"\r\x1b[K{line}\n" if self.terminal else f"{line}\n")

    def _write(self, text: str) -> None:
        if not self.quiet:
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except OSError:  # the terminal is gone
                self.quiet = True

    def _cut(self, line: str) -> str:
        """A line that is drawn over has to fit: one that wraps would stay."""
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except OSError:
            columns = 0
        return line if not columns or len(line) < columns else f"{line[: columns - 2]}…"


def guard(act: Callable[[], Exit], *, json: bool = False) -> None:
    """Run a command and leave with its exit code; every failure becomes a message, with `json` an object too."""

    def os_error(error: OSError) -> FirstlightError:
        return from_os_error(error, needed_bytes=BYTES_FOR_A_RUN, flag="--out")

    interrupted = "interrupted; no worker is left. Run the same command again."
    sys.exit(command_end.run(act, json=json, interrupted=interrupted, os_error=os_error))


def price(text: str | None) -> float | None:
    """Money an hour, as it was written; which money is up to whoever reads it.

    Raises:
        SpecError: it is no amount.
    """
    if text is None:
        return None
    try:
        amount = float(text.removesuffix("/h"))
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise SpecError(f"--price {text}: an amount an hour, such as 2.5/h.")
    return amount


def percent(text: str) -> float:
    """A share, as --fail-over has it.

    Raises:
        SpecError: it is none.
    """
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise SpecError(f"--fail-over {text}: a percentage, such as 5%.")
    return share
