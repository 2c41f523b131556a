"""Provides the run lock: only one run at a time may change a root, even if several hosts mount the volume."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable  # noqa: TC003 (a dataclass's field)
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provision.core.errors import BlockedError
from provision.fs import lease, records
from provision.fs.file_lock import PAUSE_SECONDS, FileLock
from provision.volume import trust

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from provision.core.layout import Root

_REPORT_SECONDS = 10.0  # between two reports of a wait
_EXAMPLE_SECONDS = 600  # the example value in the message that suggests --wait
_held: dict[Path, FileLock] = {}  # {folder of a root's records: the run lock that this process holds}


@dataclass(frozen=True)
class LockWait:
    """Describe how to wait for the run that holds the lock.

    `seconds` is the longest wait; 0: no wait for a run that is known to be alive. `report` is called with a progress
    message every ten seconds. `clock` and `pause` exist so that tests can replace the real time.
    """

    seconds: float = 0.0
    report: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = lease.steady_clock
    pause: Callable[[float], None] = time.sleep


@contextlib.contextmanager
def holding(root: Root, again: str, waiting: LockWait = LockWait()) -> Iterator[bool]:
    """Hold the run lock of a root during a `with` block; yield True if the lock was taken only after a wait.

    The lock of a run that has ended without releasing it is taken over, and reported. If it is unknown whether the
    other run is still alive, this function waits until that run renews its lease or the lease expires, even if
    `waiting.seconds` is less.

    Args:
        root: the root to lock.
        again: the command for the user to run again later, for the error message.
        waiting: the longest wait for another run, and the callback for its progress.

    Raises:
        BlockedError: another run holds the lock; the message has its pid, host and start time.
    """
    trust.make_state_folder(root)
    lock = FileLock(root.lock, waiting.clock, has_older_marker=True)
    has_waited = _wait(root, lock, again, waiting)
    try:
        for text in lock.lease.taken_over:
            waiting.report(f"took over {root.lock}: {text}")
        root.holder.unlink(missing_ok=True)  # an older version of firstlight has left this file
        _held[root.state] = lock
        yield has_waited
    finally:
        _held.pop(root.state, None)
        lock.release()


def require(state: Path) -> None:
    """Check that this process still holds the run lock of a root, if it has taken this lock.

    Args:
        state: the folder of the root's records.

    Raises:
        LostLockError: this run was suspended or could not write, and another run has taken over the lock.
    """
    lock = _held.get(state)
    if lock is not None:
        lock.require()


def _wait(root: Root, lock: FileLock, again: str, waiting: LockWait) -> bool:
    """Take the lock as soon as it is free; return True if that was only after a wait."""
    began = waiting.clock()
    reported: float | None = None
    while not lock.take():
        now = waiting.clock()
        left = began + waiting.seconds - now
        if not (left > 0 or lock.is_undecided):
            state = f"still holds {root.lock} after {waiting.seconds:g} s" if waiting.seconds else f"holds {root.lock}"
            raise BlockedError(
                f"{_holder_text(root)} {state}. Wait until that run ends, then run `{again}`; to wait here, "
                f"add --wait {_EXAMPLE_SECONDS}.",
                kind="locked",
                next_act=f"{again} --wait {_EXAMPLE_SECONDS}",
            )
        if reported is None or now - reported >= _REPORT_SECONDS:
            waiting.report(_report_text(root, lock, left))
            reported = now
        waiting.pause(min(PAUSE_SECONDS, left) if left > 0 else PAUSE_SECONDS)
    return reported is not None


def _report_text(root: Root, lock: FileLock, left: float) -> str:
    holder = f"{_holder_text(root)} holds {root.lock}"
    if not lock.is_undecided:
        return f"waiting for the lock, up to {left:.0f} s more: {holder}"
    return (
        f"waiting for a sign of life of the run that has the lock, up to {lock.lease.seconds_to_expiry:.0f} s more: "
        f"{holder}"
    )


def _holder_text(root: Root) -> str:
    holder = lease.read_holder(root.lock)
    return str(holder) if holder else _older_holder_text(root)


def _older_holder_text(root: Root) -> str:
    """Return the text about a run of an older version of firstlight, from the file `root.holder`."""
    try:
        row = records.read_state(root.holder)
        return f"pid {row['pid']} on {row['host']}, at work since {row['started']},"
    except (OSError, ValueError, KeyError):
        return "another run"
