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

# A process on another machine, whose state this machine cannot read.
FAR = ProcessIdentity("far", 1, "another boot", "4026531836", "another machine", "5")
# The program of `holder`: takes the lock, prints True, and releases the lock after a line on stdin.
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
    """Provides a clock whose time in seconds changes only when a test sets `now`."""

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
    """Try to take a lock at each second of the test's clock, for at most `seconds`; return whether it was taken."""
    is_taken = lease.take()
    for _ in range(int(seconds)):
        if is_taken:
            break
        clock.now += 1
        is_taken = lease.take()
    return is_taken


@contextlib.contextmanager
def holder(lock: Path, *prefix: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that holds the lock, and kill the process afterwards; `prefix` precedes its command."""
    argv = [*prefix, sys.executable, "-c", HOLDER, str(lock)]
    process = subprocess.Popen(argv, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run_before_method(lease: Lease, method: str, acts: Sequence[Callable[[], object]]) -> None:
    """Replace a method of the lease, so that its first call runs the acts before the original method."""
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
