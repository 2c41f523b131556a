"""Reads the lines of a child process with a deadline, without spinning, and ends it with all that it started."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from provision.core.redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EVERY_SECONDS = 0.5
ENOUGH, ENDED, LATE = "enough", "ended", "late"
_END_SECONDS = 10.0
_TAIL_LINES = 8
_TAIL_BYTES = 8192
_LONGEST_LINE = 16 << 20  # a thousand times the longest answer


def tail(errors: IO[bytes]) -> str:
    """The last lines of a worker's stderr, without secrets."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _TAIL_BYTES))
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return redact("\n".join(lines[-_TAIL_LINES:]))


def listen(
    process: subprocess.Popen[bytes],
    deadline: float,
    rest: bytes,
    receive: Callable[[bytes], None],
    enough: Callable[[], bool],
    look: Callable[[], None],
) -> tuple[str, bytes]:
    """Read whole lines until that is enough, the process has ended, or the deadline passes (it is LATE).

    The end of the process is waited for beside the pipe: something that it started may hold the pipe open. It is not
    reaped: its number, and so its group's, stays its own until `end`. Returns the line that has not ended yet, too.
    """
    assert process.stdout is not None  # noqa: S101 (opened as a pipe)
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    with selectors.DefaultSelector() as ready, _ending(process) as ending:
        ready.register(pipe, selectors.EVENT_READ)
        if ending is not None:
            ready.register(ending, selectors.EVENT_READ)
        looked = time.monotonic()
        while (left := deadline - time.monotonic()) > 0:
            events = {key.fd for key, _ in ready.select(min(left, EVERY_SECONDS))}
            if not events or time.monotonic() - looked >= EVERY_SECONDS:  # one that says much is looked at, too
                look()
                looked = time.monotonic()
            if not events:
                continue
            rest, closed = _drain(pipe, rest, deadline, receive)
            if ending in events:
                return ENDED, rest
            if enough():
                return ENOUGH, rest
            if closed:
                ready.unregister(pipe)
                if ending is None:
                    break
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return LATE, rest
    return ENDED, rest


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[int | None]:
    """A descriptor that can be read when the process has ended; None where the system has none (not Linux)."""
    if not hasattr(os, "pidfd_open"):
        yield None
        return
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _drain(pipe: int, rest: bytes, deadline: float, receive: Callable[[bytes], None]) -> tuple[bytes, bool]:
    """Read all that the pipe holds now. Returns the line that has not ended yet, and whether the pipe is closed."""
    while time.monotonic() < deadline:
        try:
            block = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return rest, False
        if not block:
            return rest, True
        *lines, rest = (rest + block).split(b"\n")
        rest = rest[-_LONGEST_LINE:]
        for line in lines:
            receive(line)
    return rest, False


def waited_seconds(pid: int) -> float:
    """Seconds in which a process's first thread was ready and had no core (source: the kernel's sched-stats.rst).

    0 where the system does not count them.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def end(process: subprocess.Popen[bytes]) -> None:
    """End the worker and whatever it started; where it has ended by itself, what it left behind.

    What hangs in a driver cannot be ended by anybody: it is left to the system, and has no exit code.
    """
    if process.returncode is None:
        kill(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    if process.stdout is not None:
        process.stdout.close()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker and whatever it started, and wait for nothing."""
    if process.returncode is None:  # not reaped: its number, and so its group's, is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
