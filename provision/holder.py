"""One run at a time writes to a volume, also where several hosts mount it; the second is told who the first is."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from typing import TYPE_CHECKING

from provision.errors import BlockedError
from provision.volume import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

    import filelock

    from provision.paths import Root


@contextlib.contextmanager
def holding(root: Root, again: str) -> Iterator[None]:
    """Be the one run that writes to the root.

    Args:
        root: the volume.
        again: the command to come back with.

    Raises:
        BlockedError: another run is; with its pid, host and start.
    """
    import filelock

    root.state.mkdir(parents=True, exist_ok=True)
    held: filelock.BaseFileLock = filelock.FileLock(root.lock, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        raise BlockedError(f"{_who(root)} holds {root.lock}. Wait for it, then run `{again}`.", kind="locked") from None
    except NotImplementedError:  # a file system without flock: the record itself has to be the lock
        held = _by_record(root, again)
    record = {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
    }
    try:
        write_atomic(root.holder, json.dumps(record) + "\n")
        yield
    finally:
        root.holder.unlink(missing_ok=True)
        held.release()


def _by_record(root: Root, again: str) -> filelock.BaseFileLock:
    import filelock
    import psutil

    found = _read(root)
    if found.get("host") == platform.node() and not psutil.pid_exists(int(str(found.get("pid", 0)))):
        root.lock.unlink(missing_ok=True)  # the run that made it was killed
    held = filelock.SoftFileLock(root.lock, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        raise BlockedError(
            f"{_who(root)} holds {root.lock}. Wait for it, then run `{again}`; if it is dead: rm {root.lock}",
            kind="locked",
        ) from None
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
