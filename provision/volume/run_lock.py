"""The run lock: one run at a time may change a root, also where several hosts mount the volume."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable  # noqa: TC003 (a dataclass's field)
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.fs import durable
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

    import filelock

    from provision.core.layout import Root

_REPORT_SECONDS = 10.0  # between two reports of a wait
_PAUSE_SECONDS = 0.2
_EXAMPLE_SECONDS = 600  # the example value in the message that suggests --wait


@dataclass(frozen=True)
class LockWait:
    """Describe how to wait for the run that holds the lock.

    `seconds` is the longest wait. `report` is called with a progress message every ten seconds.
    `clock` and `pause` exist so that tests can replace the real time.
    """

    seconds: float = 0.0
    report: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep


@contextlib.contextmanager
def holding(root: Root, again: str, waiting: LockWait = LockWait()) -> Iterator[bool]:
    """Hold the run lock of a root; yield whether the lock was free only after a wait.

    While the lock is held, `root.holder` names this run's pid, host and start time.

    Args:
        root: the root to lock.
        again: the command that the error message suggests.
        waiting: how long to wait for another run.

    Raises:
        BlockedError: another run holds the lock; the message has its pid, host and start time.
    """
    durable.make_folders(root.state)
    lock, has_waited = _wait(root, again, waiting)
    record = {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
    }
    try:
        write_atomic(root.holder, json.dumps(record) + "\n")
        yield has_waited
    finally:
        root.holder.unlink(missing_ok=True)
        lock.release()


def _wait(root: Root, again: str, waiting: LockWait) -> tuple[filelock.BaseFileLock, bool]:
    """Take the lock as soon as it is free.

    Returns:
        The lock, and whether it was free only after a wait.
    """
    began = waiting.clock()
    reported: float | None = None
    while True:
        lock, advice = _take(root)
        if lock is not None:
            return lock, reported is not None
        now = waiting.clock()
        left = began + waiting.seconds - now
        if not left > 0:
            state = f"still holds {root.lock} after {waiting.seconds:g} s" if waiting.seconds else f"holds {root.lock}"
            raise BlockedError(
                f"{_holder_text(root)} {state}. Wait for its end, then run `{again}`{advice}; to wait here, "
                f"add --wait {_EXAMPLE_SECONDS}.",
                kind="locked",
                next_act=f"{again} --wait {_EXAMPLE_SECONDS}",
            )
        if reported is None or now - reported >= _REPORT_SECONDS:
            waiting.report(f"waiting for the lock, up to {left:.0f} s more: {_holder_text(root)} holds {root.lock}")
            reported = now
        waiting.pause(min(_PAUSE_SECONDS, left))


def _take(root: Root) -> tuple[filelock.BaseFileLock | None, str]:
    """Try to take the lock once.

    Returns:
        The lock, or None where another run holds it; and advice for a lock file that a dead run may have left.
    """
    import filelock

    lock: filelock.BaseFileLock = filelock.FileLock(root.lock, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        return None, ""
    except NotImplementedError:  # a file system without flock, where the existence of the lock file is the lock
        return _take_soft(root), f", or, if that run is dead, rm {root.lock}"
    return lock, ""


def _take_soft(root: Root) -> filelock.BaseFileLock | None:
    """Create the lock file, or return None where it exists. The lock file of a killed run of this host is removed."""
    import filelock
    import psutil

    holder = _read_holder(root)
    if holder.get("host") == platform.node() and not psutil.pid_exists(int(str(holder.get("pid", 0)))):
        root.lock.unlink(missing_ok=True)
    lock = filelock.SoftFileLock(root.lock, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        return None
    return lock


def _holder_text(root: Root) -> str:
    holder = _read_holder(root)
    if not holder:
        return "another run"
    return f"pid {holder.get('pid')} on {holder.get('host')}, at work since {holder.get('started')},"


def _read_holder(root: Root) -> dict[str, object]:
    try:
        holder = json.loads(root.holder.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
