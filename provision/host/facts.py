"""Reads the hardware and driver of this machine from /sys and /proc, then from NVML, then from nvidia-smi."""

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
    """Describe one NVIDIA GPU; `compute_capability` is None if it could not be read."""

    name: str
    compute_capability: str | None = None


@dataclass(frozen=True)
class HostFacts:
    """Describe one machine.

    `system` is the operating system in lower case, such as "linux", `machine` the CPU architecture, such as "x86_64",
    and `cpu` the model name of the CPU. `cores` is the number of cores that this process may use. `cpu_quota` is the
    CPU limit of the control group in cores; None: no limit. `memory_bytes` is the memory that this process may use.
    `nvidia_driver` is the driver version; None: no driver was found.
    """

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
        """Return the facts as a dict of JSON types, with the field names as keys."""
        return asdict(self)


def probe(sysroot: Path = Path("/")) -> HostFacts:
    """Return the facts of this machine.

    Args:
        sysroot: the folder that contains proc, sys and dev; tests use another folder than `/`.
    """
    driver = _driver(sysroot)
    gpus = _gpus(sysroot, driver)
    for query in (_nvml, _nvidia_smi):
        if driver is None or (gpus and gpus[0].compute_capability is None):
            other_driver, other_gpus = query()
            driver = driver or other_driver
            gpus = other_gpus or gpus
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
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _read(sysroot / "proc/driver/nvidia/version"))
    return match.group(1) if match else None


def _gpus(sysroot: Path, driver: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that /proc lists, without their compute capabilities.

    Without a device node the tuple is empty, because a container may have the driver in /proc but no GPU.
    """
    if driver is None or not list((sysroot / "dev").glob("nvidia[0-9]*")):
        return ()
    names = []
    for file in sorted((sysroot / "proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+?)\s*$", _read(file), re.MULTILINE)
        names.append(match.group(1) if match else "unknown NVIDIA card")
    return tuple(Gpu(name) for name in names) or (Gpu("unknown NVIDIA card"),)


def _nvml() -> tuple[str | None, tuple[Gpu, ...]]:
    """Return (driver version, GPUs) from NVML; (None, ()) if NVML fails.

    NVML is read before nvidia-smi, because a container often has this library but not the program.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, ()
    gpus = []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        for number in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(number)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
            gpus.append(Gpu(_text(pynvml.nvmlDeviceGetName(device)), f"{major}.{minor}"))
    except pynvml.NVMLError:
        return None, ()
    finally:
        pynvml.nvmlShutdown()
    return driver, tuple(gpus)


def _text(value: str | bytes) -> str:
    """Return a value of NVML as text; older versions of the library return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _nvidia_smi() -> tuple[str | None, tuple[Gpu, ...]]:
    if shutil.which("nvidia-smi") is None:
        return None, ()
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        completed = process.run(query, timeout_seconds=20, check=False)
    except FirstlightError:
        return None, ()
    rows = [[cell.strip() for cell in line.split(",")] for line in completed.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 3 and re.fullmatch(r"\d+(\.\d+)+", row[2])]
    if completed.returncode != 0 or not rows:
        return None, ()
    return rows[0][2], tuple(Gpu(name, cap if re.fullmatch(r"\d+\.\d+", cap) else None) for name, cap, _ in rows)


def _cpu(sysroot: Path) -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read(sysroot / "proc/cpuinfo"), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or "unknown"


def _cpu_quota(sysroot: Path) -> float | None:
    """Return the CPU limit of the control group in cores, or None if there is no limit (cgroup v2, else v1)."""
    words = _read(sysroot / "sys/fs/cgroup/cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    quota = _read(sysroot / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
    period = _read(sysroot / "sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory(sysroot: Path) -> int:
    """Return the memory that this process may use, in bytes: the machine's memory, or a smaller control group limit.

    In a container the limit lies at the top of /sys/fs/cgroup (cgroup v2 and v1). Without a limit the file has the text
    "max", or a number larger than the memory of any machine.
    """
    match = re.search(r"^MemTotal:\s*(\d+) kB", _read(sysroot / "proc/meminfo"), re.MULTILINE)
    if match:
        total = int(match.group(1)) * 1024
    else:
        import psutil

        total = int(psutil.virtual_memory().total)
    files = ("memory.max", "memory/memory.limit_in_bytes")
    limits = [_read(sysroot / "sys/fs/cgroup" / file).strip() for file in files]
    return min([total, *(int(limit) for limit in limits if limit.isdigit() and limit != "0")])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
