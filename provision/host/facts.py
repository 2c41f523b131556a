"""What this machine is, read from /sys, /proc, NVML and nvidia-smi, in that order; nothing is changed."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from provision.core import process
from provision.core.errors import FirstlightError


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA card; what could not be read is None."""

    name: str
    compute_capability: str | None = None


@dataclass(frozen=True)
class HostFacts:
    """One machine."""

    system: str
    machine: str
    hostname: str
    cpu: str
    cores: int
    cpu_quota: float | None
    memory_bytes: int
    nvidia_driver: str | None
    gpus: tuple[Gpu, ...]

    def to_dict(self) -> dict[str, object]:
        """As plain JSON types."""
        return asdict(self)


def probe(sysroot: Path = Path("/")) -> HostFacts:
    """Read the machine's facts.

    Args:
        sysroot: where /proc, /sys and /dev are; another folder in tests.
    """
    driver = _driver(sysroot)
    gpus = _gpus(sysroot, driver)
    for ask in (_nvml, _nvidia_smi):
        if driver is None or (gpus and gpus[0].compute_capability is None):
            asked_driver, asked = ask()
            driver = driver or asked_driver
            gpus = asked or gpus
    return HostFacts(
        system=platform.system().lower(),
        machine=platform.machine(),
        hostname=platform.node(),
        cpu=_cpu(sysroot),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_quota=_cpu_quota(sysroot),
        memory_bytes=_memory(sysroot),
        nvidia_driver=driver,
        gpus=gpus,
    )


def _driver(sysroot: Path) -> str | None:
    text = _read(sysroot / "sys/module/nvidia/version")
    if text:
        return text.strip()
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _read(sysroot / "proc/driver/nvidia/version"))
    return found.group(1) if found else None


def _gpus(sysroot: Path, driver: str | None) -> tuple[Gpu, ...]:
    """The cards whose device node is here: a container may see the driver and no card."""
    if driver is None or not list((sysroot / "dev").glob("nvidia[0-9]*")):
        return ()
    names = []
    for file in sorted((sysroot / "proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+?)\s*$", _read(file), re.MULTILINE)
        names.append(found.group(1) if found else "unknown NVIDIA card")
    return tuple(Gpu(name) for name in names) or (Gpu("unknown NVIDIA card"),)


def _nvml() -> tuple[str | None, tuple[Gpu, ...]]:
    """What the driver's own library says; a container often has it and no nvidia-smi."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, ()
    gpus = []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        for number in range(pynvml.nvmlDeviceGetCount()):
            card = pynvml.nvmlDeviceGetHandleByIndex(number)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(card)
            gpus.append(Gpu(_text(pynvml.nvmlDeviceGetName(card)), f"{major}.{minor}"))
    except pynvml.NVMLError:
        return None, ()
    finally:
        pynvml.nvmlShutdown()
    return driver, tuple(gpus)


def _text(value: str | bytes) -> str:
    """Older libraries answer in bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _nvidia_smi() -> tuple[str | None, tuple[Gpu, ...]]:
    if shutil.which("nvidia-smi") is None:
        return None, ()
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = process.run(query, timeout_seconds=20, check=False)
    except FirstlightError:
        return None, ()
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 3 and re.fullmatch(r"\d+(\.\d+)+", row[2])]
    if done.returncode != 0 or not rows:
        return None, ()
    return rows[0][2], tuple(Gpu(name, cap if re.fullmatch(r"\d+\.\d+", cap) else None) for name, cap, _ in rows)


def _cpu(sysroot: Path) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read(sysroot / "proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or "unknown"


def _cpu_quota(sysroot: Path) -> float | None:
    """The cores that the control group grants, where it grants fewer than it shows (cgroup v2, then v1)."""
    words = _read(sysroot / "sys/fs/cgroup/cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    quota = _read(sysroot / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
    period = _read(sysroot / "sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory(sysroot: Path) -> int:
    """Return the bytes of memory that this process may use: the machine's, or its control group's where that has fewer.

    A container sees its group's limit at the top of /sys/fs/cgroup (version 2, then 1); no limit is "max", or a number
    larger than any machine.
    """
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read(sysroot / "proc/meminfo"), re.MULTILINE)
    if found:
        whole = int(found.group(1)) * 1024
    else:
        import psutil

        whole = int(psutil.virtual_memory().total)
    files = ("memory.max", "memory/memory.limit_in_bytes")
    limits = [_read(sysroot / "sys/fs/cgroup" / file).strip() for file in files]
    return min([whole, *(int(limit) for limit in limits if limit.isdigit() and limit != "0")])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
