"""Reads the lines of a child process until a deadline without busy waiting, and ends the process with its children."""

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

POLL_SECONDS = 0.5
DONE, ENDED, LATE = "done", "ended", "late"
_READ, _EMPTY, _CLOSED = "read", "empty", "closed"
_END_SECONDS = 10.0
_TAIL_LINES = 8
_TAIL_BYTES = 8192
_BLOCK_BYTES = 1 << 16
_MAX_LINE_BYTES = 16 << 20  # a thousand times the length of the longest event


def tail(errors: IO[bytes]) -> str:
    """Return the last lines (at most 8) of a worker's stderr as text, with passwords and tokens removed."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _TAIL_BYTES))
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return redact("\n".join(lines[-_TAIL_LINES:]))


def listen(
    process: subprocess.Popen[bytes],
    deadline: float,
    rest: bytes,
    receive: Callable[[bytes], None],
    is_done: Callable[[], bool],
    poll: Callable[[], None],
) -> tuple[str, bytes]:
    """Read lines from a process until `is_done()` is true, the process has ended, or the deadline has passed.

    The end of the process is awaited as well as the end of its pipe, since a child of the process may keep the pipe
    open. The process is not reaped here, so no other process can get its id or its group's id before `end` kills the
    group.

    Args:
        process: the child process; its stdout is a pipe.
        deadline: the time of time.monotonic at which to stop.
        rest: the incomplete line that the previous call returned; b"" at the first call.
        receive: called with each complete line, without its line feed.
        is_done: called after each read.
        poll: called twice a second.

    Returns:
        DONE (`is_done()` is true), ENDED (the process has ended) or LATE (the deadline has passed), and the incomplete
        line at the end of what was read.
    """
    assert process.stdout is not None  # noqa: S101 (opened as a pipe)
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    with selectors.DefaultSelector() as ready, _ending(process) as ending:
        ready.register(pipe, selectors.EVENT_READ)
        if ending is not None:
            ready.register(ending, selectors.EVENT_READ)
        polled = time.monotonic()
        while (remaining := deadline - time.monotonic()) > 0:
            events = {key.fd for key, _ in ready.select(min(remaining, POLL_SECONDS))}
            if not events or time.monotonic() - polled >= POLL_SECONDS:  # also while the process writes all the time
                poll()
                polled = time.monotonic()
            if not events:
                continue
            if ending in events:
                return ENDED, _drain(pipe, rest, deadline, receive)
            rest, state = _read_block(pipe, rest, receive)
            if is_done():
                return DONE, rest
            if state == _CLOSED:
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
    """Yield a file descriptor that becomes readable when the process ends.

    None where os.pidfd_open is missing (not Linux).
    """
    if not hasattr(os, "pidfd_open"):
        yield None
        return
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_block(pipe: int, rest: bytes, receive: Callable[[bytes], None]) -> tuple[bytes, str]:
    """Read one block of bytes from the pipe, and pass each complete line to `receive`.

    It reads no more than one block, since a process that writes without a pause never leaves the pipe empty.

    Returns:
        The incomplete line, and _READ, _EMPTY (nothing to read now) or _CLOSED.
    """
    try:
        block = os.read(pipe, _BLOCK_BYTES)
    except BlockingIOError:
        return rest, _EMPTY
    if not block:
        return rest, _CLOSED
    *lines, rest = (rest + block).split(b"\n")
    for line in lines:
        receive(line)
    return rest[-_MAX_LINE_BYTES:], _READ


def _drain(pipe: int, rest: bytes, deadline: float, receive: Callable[[bytes], None]) -> bytes:
    """Pass the complete lines that are left in the pipe to `receive`, and return the incomplete line."""
    state = _READ
    while state == _READ and time.monotonic() < deadline:
        rest, state = _read_block(pipe, rest, receive)
    return rest


def waited_seconds(pid: int) -> float:
    """Return the seconds in which the first thread of a process was ready to run and waited for a core.

    0 where the kernel does not count them. Source: the kernel's sched-stats.rst.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group of a worker, and reap the worker.

    If the worker has ended already, this kills the children that it left behind. A process that hangs in a driver
    cannot be killed. After ten seconds it is no longer awaited, and its exit code stays None.
    """
    if process.returncode is None:
        kill(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    if process.stdout is not None:
        process.stdout.close()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group of a worker without waiting for its end."""
    if process.returncode is None:  # not reaped, so no other process has its id or its group's id
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
