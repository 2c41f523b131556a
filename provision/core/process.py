"""Runs other programs as child processes; tests replace `run`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core import child_environment
from provision.core.errors import FirstlightError
from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_GRACE_SECONDS = 5.0


class CommandError(FirstlightError):
    """Report that a child process failed; the message ends in the last lines of its output."""

    kind = "program"


@dataclass(frozen=True)
class Completed:
    """Hold the result of a program: its arguments, its exit code (-N after signal N) and its output."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str

    def tail(self, lines: int = 12) -> str:
        """Return the last `lines` lines of stderr, or of stdout if stderr is empty, without secrets."""
        text = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return redact("\n".join(text[-lines:]))


def signal_name(number: int) -> str:
    """Return the name of a signal, or "signal N" for a real-time signal, which has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float | None = None,
    stdin: str | None = None,
    check: bool = True,
) -> Completed:
    """Run a program to its end and return its exit code and output.

    Args:
        argv: the program and its arguments; no shell is involved.
        env: all environment variables of the program; default: those that `child_environment.child` keeps.
        timeout_seconds: the time after which the program is killed; default: no limit.
        stdin: the text on the program's stdin; default: an empty stdin.
        check: raise an error if the exit code is not 0.

    Raises:
        CommandError: the program cannot be started, exceeds the timeout, or (with `check`) its exit code is not 0.
    """
    words = [str(word) for word in argv]
    try:
        process = subprocess.Popen(
            words,
            env=child_environment.child(os.environ) if env is None else dict(env),
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise CommandError(f"{words[0]} does not start: {error.strerror}.") from error
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise CommandError(f"{words[0]} did not end within {timeout_seconds:g} s and was killed.") from None
    except BaseException:
        _end(process)
        raise
    completed = Completed(tuple(words), process.returncode, stdout, stderr)
    if check and completed.returncode != 0:
        end = f"exit {completed.returncode}" if completed.returncode > 0 else signal_name(-completed.returncode)
        raise CommandError(f"{words[0]} failed ({end}):\n{completed.tail()}")
    return completed


def _end(process: subprocess.Popen[str]) -> None:
    """End a child process after an interrupt.

    SIGTERM comes first, so that it can delete its temporary files. SIGKILL follows after 5 seconds.
    """
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
