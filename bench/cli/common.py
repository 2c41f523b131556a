"""Defines what the commands of `bench` share: flags, the progress on stderr, and the exit code."""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.core.errors import BYTES_FOR_A_RUN
from provision.core import command_end
from provision.core.errors import FirstlightError, SpecError, from_os_error
from provision.core.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.errors import Exit
    from bench.run.request import RunRequest

OUT = Path("results")
OutFlag = Annotated[Path, typer.Option("--out", help="The folder for the files of runs.", metavar="DIR")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
NoColorFlag = Annotated[bool, typer.Option("--no-color", help="Print without colours (like NO_COLOR).")]
DeviceFlag = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
PythonFlag = Annotated[Path | None, typer.Option("--python", help="The interpreter to measure.")]
RootFlag = Annotated[str | None, typer.Option("--root", help="firstlight's folder on the volume.", metavar="DIR")]


def _print_version(is_given: bool) -> None:
    """Print the version and end, if --version is given."""
    if is_given:
        print(f"bench {VERSION}")
        raise typer.Exit


VersionFlag = Annotated[
    bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
]


@dataclass(frozen=True)
class RootFlags:
    """Hold the flags that locate the root; the fields have the same names as those of RunRequest."""

    root: RootFlag = None
    host: Annotated[Path | None, typer.Option("--host", help="The file that describes this host.", metavar="FILE")] = (
        None
    )
    envs: Annotated[Path | None, typer.Option("--envs", help="Another envs/ folder.", metavar="DIR")] = None


@dataclass(frozen=True)
class RunFlags(RootFlags):
    """Hold the flags that locate the root and the folder of a new run."""

    out: OutFlag = OUT

    def request(self, suite: str, **fields: Any) -> RunRequest:
        """Return a RunRequest with the values of these flags; `fields` are its further fields."""
        from bench.run.request import RunRequest

        return RunRequest(suite=suite, **vars(self), **fields)


@dataclass(frozen=True)
class OutputFlags:
    """Hold the flags on how the result is printed."""

    json: JsonFlag = False
    no_color: NoColorFlag = False


@dataclass(frozen=True)
class ProgressFlags:
    """Hold the flags on how the result is printed, and whether progress is shown."""

    json: JsonFlag = False
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False
    no_color: NoColorFlag = False


_REDRAW_SECONDS, _LINE_SECONDS = 1.0, 10.0


def command_line() -> str:
    """Return the command line of this process, starting with "bench"."""
    words = shlex.join(["bench", *sys.argv[1:]])
    # An argument may hold bytes that are not UTF-8. The run's file is UTF-8, so such bytes become escapes.
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


class Progress:
    """Show the progress of a run on stderr.

    On a terminal each case has one line, which is redrawn at most once a second. Otherwise a line is written at most
    every ten seconds. The parent draws only after a line of the worker or its poll twice a second, so drawing takes no
    time from the measured work. If stderr can no longer be written, the progress stops and the run continues.
    """

    def __init__(self, *, quiet: bool, now: Callable[[], float] = time.monotonic) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._now = now
        self._shown = now()

    def begin(self, line: str) -> None:
        """Show that the case of this line begins; only on a terminal."""
        if self.terminal:
            self._write(f"\r\x1b[K{self._cut(f'{line} …')}")
            self._shown = self._now()

    def update(self, line: Callable[[], str]) -> None:
        """Show the present activity instead of the last one; `line` is called only if its text is shown."""
        if self.quiet or self._now() - self._shown < (_REDRAW_SECONDS if self.terminal else _LINE_SECONDS):
            return
        self._shown = self._now()
        self._write(f"\r\x1b[K{self._cut(line())}" if self.terminal else f"{line()}\n")

    def report(self, line: str) -> None:
        """Write a line that stays."""
        self._shown = self._now()
        self._write(f"\r\x1b[K{line}\n" if self.terminal else f"{line}\n")

    def _write(self, text: str) -> None:
        if not self.quiet:
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except OSError:  # the terminal was closed
                self.quiet = True

    def _cut(self, line: str) -> str:
        """Return a line cut to the terminal's width, since a line that wraps cannot be redrawn."""
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except OSError:
            columns = 0
        return line if not columns or len(line) < columns else f"{line[: columns - 2]}…"


def guard(act: Callable[[], Exit], *, json: bool = False) -> None:
    """Run a command and exit with the exit code that it returns.

    An error becomes a message on stderr; with `json` it also becomes a JSON object on stdout.
    """

    def os_error(error: OSError) -> FirstlightError:
        return from_os_error(error, needed_bytes=BYTES_FOR_A_RUN, flag="--out")

    interrupted = "interrupted; all workers have ended. Run the same command again."
    sys.exit(command_end.run(act, json=json, interrupted=interrupted, os_error=os_error))


def price(text: str | None) -> float | None:
    """Return the number of a price per hour such as "2.5/h", in any currency; None for None.

    Raises:
        SpecError: the text is not a price.
    """
    if text is None:
        return None
    try:
        amount = float(text.removesuffix("/h"))
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise SpecError(f"--price {text} is not a price per hour. Give a number such as 2.5/h.")
    return amount


def percent(text: str) -> float:
    """Return a percentage such as "3%" as a fraction: 0.03.

    Raises:
        SpecError: the text is not a percentage from 0 to below 100.
    """
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise SpecError(f"--fail-over {text} is not a percentage. Give a number such as 5%.")
    return share
