"""Starts other programs; the one seam that tests replace."""

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
    """A program that we started failed; the message ends in its last lines."""

    kind = "program"


@dataclass(frozen=True)
class Completed:
    """What a program left behind."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str

    def tail(self, lines: int = 12) -> str:
        """The last lines it printed, without secrets."""
        text = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return redact("\n".join(text[-lines:]))


def signal_name(number: int) -> str:
    """What a signal is called; its number where it has no name of its own (real-time signals)."""
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
    """Run a program to its end and keep what it prints.

    Args:
        argv: the program and its arguments; no shell is involved.
        env: its whole environment, else ours without what would bend it.
        timeout_seconds: when it is killed.
        stdin: what it reads, else nothing.
        check: raise when it does not exit 0.

    Raises:
        CommandError: it is not there, ran out of time, or (with `check`) failed.
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
    done = Completed(tuple(words), process.returncode, stdout, stderr)
    if check and done.returncode != 0:
        how = f"exit {done.returncode}" if done.returncode > 0 else signal_name(-done.returncode)
        raise CommandError(f"{words[0]} failed ({how}):\n{done.tail()}")
    return done


def _end(process: subprocess.Popen[str]) -> None:
    """Stop a child when we are interrupted: first kindly, so that it can tidy its own files."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
