"""Identifies a process across hosts, containers and reboots, and tests whether such a process has ended."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

_IS_LINUX = sys.platform.startswith("linux")
_STATE, _START = 0, 19  # the positions in /proc/PID/stat after the program's name, which ends with the last ")"
_ENDED_STATES = {"Z", "X", "x"}  # a zombie runs no code, and a container without an init process keeps it


class Life(Enum):
    """Name what is known about a process: RUNNING, ENDED, or UNKNOWN as it runs where this process cannot look."""

    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class ProcessIdentity:
    """Identify one process. An empty text is a value that this host does not show.

    Containers of one machine share its boot id, and often the host's name, but not the pid namespace. So a pid means
    something only within the same boot and the same namespace. `machine` is the serial UUID of the mainboard, which a
    reboot does not change. `start` tells apart two processes that had the same pid one after the other.
    """

    host: str
    pid: int
    boot: str
    namespace: str
    machine: str
    start: str

    def life(self) -> Life:
        """Return whether this process still runs, as far as the current process can know."""
        here = current()
        if self.boot and self.namespace and (self.boot, self.namespace) == (here.boot, here.namespace):
            return Life.RUNNING if _is_running(self.pid, self.start) else Life.ENDED
        is_same_machine = bool(self.machine) and (self.host, self.machine) == (here.host, here.machine)
        is_earlier_boot = bool(self.boot and here.boot) and self.boot != here.boot
        return Life.ENDED if is_same_machine and is_earlier_boot else Life.UNKNOWN


def current() -> ProcessIdentity:
    """Return the identity of this process."""
    pid = os.getpid()
    boot, namespace, machine = _host_values()
    return ProcessIdentity(platform.node(), pid, boot, namespace, machine, _start(pid) or "")


@cache
def _host_values() -> tuple[str, str, str]:
    """Return (boot id, pid namespace, machine id)."""
    if not _IS_LINUX:
        import psutil

        # The time of the boot is no unique id, so the host's name is part of it.
        return f"{platform.node()} {psutil.boot_time():.0f}", "none", ""
    try:
        namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        namespace = ""
    return _text("/proc/sys/kernel/random/boot_id"), namespace, _text("/sys/class/dmi/id/product_uuid")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _is_running(pid: int, start: str) -> bool:
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:  # it runs, and belongs to another user
            pass
    present = _start(pid)
    if present is None:  # /proc may be mounted so that it hides the processes of other users
        return os.name == "posix"
    return present == start


def _start(pid: int) -> str | None:
    """Return the start time of a running process, "" for one that has ended, and None if it cannot be read."""
    if not _IS_LINUX:
        import psutil

        try:
            process = psutil.Process(pid)
            return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
        except psutil.Error:
            return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return "" if fields[_STATE].decode() in _ENDED_STATES else fields[_START].decode()
