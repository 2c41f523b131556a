"""Provides claims of a lease, processes that hold a lock, and a clock that only the tests set."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from provision.fs.lease import Holder
from provision.fs.process_identity import ProcessIdentity
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from provision.fs.file_lock import FileLock
    from provision.fs.lease import Lease

# A process on a machine about which this one knows nothing.
FAR = ProcessIdentity("far", 1, "another boot", "4026531836", "another machine", "5")
# Takes the lock, prints its claim, and releases the lock after a line on stdin.
HOLDER = """
import sys
from pathlib import Path
from provision.fs.file_lock import FileLock
lock = FileLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.readline()
lock.require()
lock.release()
"""


@dataclass
class Clock:
    """Return a time that changes only when a test sets it."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def write_claim(lock: Path, identity: ProcessIdentity, *, number: int = 1, renewals: int = 0) -> Path:
    claim = lock.with_name(f"{lock.name}.lease-{number}")
    claim.write_bytes(Holder(identity, f"token {number}", "2026-01-01 00:00:00Z").to_bytes(renewals))
    return claim


def claims(lock: Path) -> list[str]:
    return sorted(path.name for path in lock.parent.glob(f"{lock.name}.lease-*"))


def wait_in_steps(lease: Lease | FileLock, clock: Clock, seconds: float) -> bool:
    """Try to take a lock every second, and return the last result."""
    is_taken = lease.take()
    for _ in range(int(seconds)):
        if is_taken:
            break
        clock.now += 1
        is_taken = lease.take()
    return is_taken


@contextlib.contextmanager
def holder(lock: Path, *prefix: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock."""
    argv = [*prefix, sys.executable, "-c", HOLDER, str(lock)]
    process = subprocess.Popen(argv, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def interrupt(lease: Lease, method: str, acts: Sequence[Callable[[], object]]) -> None:
    """Let the acts run once, just before the given method of the lease."""
    original = getattr(lease, method)
    is_done = False

    def run(*arguments: Any) -> Any:
        nonlocal is_done
        if not is_done:
            is_done = True
            for act in acts:
                act()
        return original(*arguments)

    setattr(lease, method, run)
