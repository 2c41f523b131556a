"""What the commands of `bench` share: their flags, their progress, and how each ends."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.errors import BYTES_FOR_A_RUN
from provision import ending
from provision.errors import FirstlightError, SpecError, from_os_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.errors import Exit

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


def paper(no_color: bool) -> tuple[bool, int | None]:
    """(whether colours are wanted, columns where the terminal does not tell)."""
    color = sys.stdout.isatty() and not no_color and "NO_COLOR" not in os.environ
    return color, None if sys.stdout.isatty() else 160


def said() -> str:
    """The command as it was typed, or as make typed it."""
    words = shlex.join(["bench", *sys.argv[1:]])
    # What is no character is shown by its number: a name in the shell may hold any byte, a run's file may not.
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


class Progress:
    """A line a case to stderr; on a terminal, the case at work stands there too until its line replaces it.

    Nothing moves meanwhile: a parent that draws would take time from what is measured.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def begin(self, line: str) -> None:
        """A case begins."""
        if self.terminal and not self.quiet:
            print(f"{line} …", end="", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Something is known."""
        if not self.quiet:
            print(f"\r\x1b[K{line}" if self.terminal else line, file=sys.stderr, flush=True)


def guard(act: Callable[[], Exit], *, json: bool = False) -> None:
    """Run a command and leave with its exit code; every failure becomes a message, with `json` an object too."""

    def os_error(error: OSError) -> FirstlightError:
        return from_os_error(error, needed_bytes=BYTES_FOR_A_RUN, flag="--out")

    interrupted = "interrupted; no worker is left. Run the same command again."
    sys.exit(ending.run(act, json=json, interrupted=interrupted, os_error=os_error))


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
