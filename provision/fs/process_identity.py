"""Identifies a process across hosts, containers and reboots, and tests whether a process with an identity has ended."""

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
_ENDED_STATES = {"Z", "X", "x"}  # Z: a zombie runs no code; it remains forever in a container without an init process


class Life(Enum):
    """Name the known state of a process: RUNNING, ENDED, or UNKNOWN (it belongs to another host or container)."""

    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class ProcessIdentity:
    """Identify one process. An empty text is a value that could not be read on the process's host.

    `host` is the host name, `boot` the boot id, and `namespace` the inode of the pid namespace. Containers of one
    machine share the boot id, and often the host name, but not the pid namespace. So a pid is unique only within one
    boot and one namespace. `machine` is the UUID of the mainboard, which a reboot does not change. `start` is the start
    time of the process; it differs for two processes that had the same pid one after the other.
    """

    host: str
    pid: int
    boot: str
    namespace: str
    machine: str
    start: str

    def life(self) -> Life:
        """Return RUNNING or ENDED for the identified process, or UNKNOWN if this process cannot read its state."""
        here = current()
        if self.boot and self.namespace and (self.boot, self.namespace) == (here.boot, here.namespace):
            return Life.RUNNING if _is_running(self.pid, self.start) else Life.ENDED
        is_same_machine = bool(self.machine) and (self.host, self.machine) == (here.host, here.machine)
        is_earlier_boot = bool(self.boot and here.boot) and self.boot != here.boot
        return Life.ENDED if is_same_machine and is_earlier_boot else Life.UNKNOWN


def current() -> ProcessIdentity:
    """Return the identity of the calling process."""
    pid = os.getpid()
    boot, namespace, machine = _host_values()
    return ProcessIdentity(platform.node(), pid, boot, namespace, machine, _start(pid) or "")


@cache
def _host_values() -> tuple[str, str, str]:
    """Return (boot id, pid namespace, machine id)."""
    if not _IS_LINUX:
        import psutil

        # Two hosts can have the same boot time, so the host name is part of this boot id.
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
    """Return the start time of a process as text; "" if the process has ended, None if its state cannot be read."""
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
