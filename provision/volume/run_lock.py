"""One run at a time writes to a volume, also where several hosts mount it; the second is told who the first is."""

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
from provision.fs.atomic import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

    import filelock

    from provision.core.layout import Root

_TELL_SECONDS = 10.0
_PAUSE_SECONDS = 0.2
_EXAMPLE = 600  # seconds, in the message that names the flag


@dataclass(frozen=True)
class LockWait:
    """Wait for the run that holds the lock for at most `seconds`, and show it; tests pass their own clock."""

    seconds: float = 0.0
    tell: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep


@contextlib.contextmanager
def holding(root: Root, again: str, waiting: LockWait = LockWait()) -> Iterator[bool]:
    """Be the one run that writes to the root; yields whether another one was waited for.

    Args:
        root: the volume.
        again: the command to come back with.
        waiting: for how long another run is waited for.

    Raises:
        BlockedError: another run is; with its pid, host and start.
    """
    root.state.mkdir(parents=True, exist_ok=True)
    held, has_waited = _wait(root, again, waiting)
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
        held.release()


def _wait(root: Root, again: str, waiting: LockWait) -> tuple[filelock.BaseFileLock, bool]:
    """Take the lock, now or when it comes free; and whether it was not free at once."""
    began = waiting.clock()
    told: float | None = None
    while True:
        held, if_dead = _take(root)
        if held is not None:
            return held, told is not None
        now = waiting.clock()
        left = began + waiting.seconds - now
        if not left > 0:
            still = f"still holds {root.lock} after {waiting.seconds:g} s" if waiting.seconds else f"holds {root.lock}"
            raise BlockedError(
                f"{_who(root)} {still}. Wait for it, then run `{again}`{if_dead}; to wait here, add --wait {_EXAMPLE}.",
                kind="locked",
                next_act=f"{again} --wait {_EXAMPLE}",
            )
        if told is None or now - told >= _TELL_SECONDS:
            waiting.tell(f"waiting for the lock, up to {left:.0f} s more: {_who(root)} holds {root.lock}")
            told = now
        waiting.pause(min(_PAUSE_SECONDS, left))


def _take(root: Root) -> tuple[filelock.BaseFileLock | None, str]:
    """The lock where it is free; and what to do where its holder is dead and the file system does not know it."""
    import filelock

    held: filelock.BaseFileLock = filelock.FileLock(root.lock, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        return None, ""
    except NotImplementedError:  # a file system without flock: the record itself has to be the lock
        return _by_record(root), f", or, if it is dead, rm {root.lock}"
    return held, ""


def _by_record(root: Root) -> filelock.BaseFileLock | None:
    import filelock
    import psutil

    found = _read(root)
    if found.get("host") == platform.node() and not psutil.pid_exists(int(str(found.get("pid", 0)))):
        root.lock.unlink(missing_ok=True)  # the run that made it was killed
    held = filelock.SoftFileLock(root.lock, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        return None
    return held


def _who(root: Root) -> str:
    found = _read(root)
    if not found:
        return "another run"
    return f"pid {found.get('pid')} on {found.get('host')}, at work since {found.get('started')},"


def _read(root: Root) -> dict[str, object]:
    try:
        found = json.loads(root.holder.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
