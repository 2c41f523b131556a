"""Tests the facts of recorded machines, whose /proc, /sys and /dev are laid out in a folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from provision.host import facts
from provision.host.facts import Gpu

if TYPE_CHECKING:
    from pathlib import Path

CPUINFO = "processor\t: 0\nmodel name\t: AMD EPYC 7B12\n"
PROC_VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:\n"
OPEN_VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (d)\nGCC version:\n"


@pytest.fixture(autouse=True)
def _no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()


def machine(root: Path, **files: str) -> Path:
    """Write the files of a machine below `root`, and return `root`; `__` in a name stands for a slash."""
    for path, text in files.items():
        file = root / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def card(root: Path, name: str) -> None:
    """Add the driver's file of a GPU and its device node to the files of a machine."""
    folder = root / "proc/driver/nvidia/gpus/0000:00:04.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 10\n")
    (root / "dev").mkdir(exist_ok=True)
    (root / "dev/nvidia0").touch()


def smi(tmp_path: Path, text: str, code: int = 0) -> None:
    """Put an nvidia-smi on the PATH that prints a text and exits with a code."""
    program = tmp_path / "bin/nvidia-smi"
    program.write_text(f"#!/bin/sh\n/bin/cat <<'E'\n{text}\nE\nexit {code}\n")
    program.chmod(0o755)


def test_machine_without_a_gpu_has_no_driver_and_no_gpus(tmp_path: Path) -> None:
    root = machine(tmp_path / "root", proc__cpuinfo=CPUINFO, proc__meminfo="MemTotal:       2048 kB\n")
    machine_facts = facts.probe(root)
    assert (machine_facts.cpu, machine_facts.memory_bytes) == ("AMD EPYC 7B12", 2048 * 1024)
    assert (machine_facts.nvidia_driver, machine_facts.gpus, machine_facts.cpu_quota) == (None, (), None)
    assert machine_facts.cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("text", "driver"), [(PROC_VERSION, "550.54.15"), (OPEN_VERSION, "580.65.06")])
def test_gpu_is_found_in_a_container_without_nvidia_smi(tmp_path: Path, text: str, driver: str) -> None:
    root = machine(tmp_path / "root", proc__driver__nvidia__version=text)
    card(root, "Tesla T4")
    machine_facts = facts.probe(root)
    assert machine_facts.nvidia_driver == driver
    assert machine_facts.gpus == (Gpu("Tesla T4"),)


def test_driver_without_a_device_node_yields_no_gpu(tmp_path: Path) -> None:
    root = machine(tmp_path / "root", sys__module__nvidia__version="570.86.10\n")
    machine_facts = facts.probe(root)
    assert (machine_facts.nvidia_driver, machine_facts.gpus) == ("570.86.10", ())


def test_compute_capability_is_read_from_nvidia_smi(tmp_path: Path) -> None:
    root = machine(tmp_path / "root", sys__module__nvidia__version="535.129.03\n")
    card(root, "NVIDIA A100-SXM4-80GB")
    smi(tmp_path, "NVIDIA A100-SXM4-80GB, 8.0, 535.129.03\nNVIDIA A100-SXM4-80GB, 8.0, 535.129.03")
    machine_facts = facts.probe(root)
    assert machine_facts.gpus == (Gpu("NVIDIA A100-SXM4-80GB", "8.0"),) * 2


def test_old_nvidia_smi_yields_no_compute_capability(tmp_path: Path) -> None:
    smi(tmp_path, "Tesla K80, [N/A], 470.223.02")
    machine_facts = facts.probe(machine(tmp_path / "root"))
    assert (machine_facts.nvidia_driver, machine_facts.gpus) == ("470.223.02", (Gpu("Tesla K80"),))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9),
        ("No devices were found", 6),
        ("", 0),
    ],
)
def test_failing_nvidia_smi_yields_no_gpu(tmp_path: Path, text: str, code: int) -> None:
    smi(tmp_path, text, code)
    machine_facts = facts.probe(machine(tmp_path / "root"))
    assert (machine_facts.nvidia_driver, machine_facts.gpus) == (None, ())


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"sys__fs__cgroup__cpu.max": "max 100000\n"}, None),
        ({"sys__fs__cgroup__cpu.max": "250000 100000\n"}, 2.5),
        ({"sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1", "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000"}, None),
        ({"sys__fs__cgroup__cpu__cpu.cfs_quota_us": "50000", "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000"}, 0.5),
    ],
    ids=["cgroup v2 without a limit", "cgroup v2", "cgroup v1 without a limit", "cgroup v1"],
)
def test_cpu_quota_is_read_from_the_control_group(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert facts.probe(machine(tmp_path / "root", **files)).cpu_quota == quota


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({}, 16_000_000 * 1024),
        ({"sys__fs__cgroup__memory.max": "max\n"}, 16_000_000 * 1024),
        ({"sys__fs__cgroup__memory.max": "8589934592\n"}, 8 << 30),
        ({"sys__fs__cgroup__memory__memory.limit_in_bytes": "8589934592\n"}, 8 << 30),
        ({"sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n"}, 16_000_000 * 1024),
    ],
    ids=["no cgroup", "cgroup v2 without a limit", "cgroup v2", "cgroup v1", "cgroup v1 without a limit"],
)
def test_memory_is_the_limit_of_the_control_group_or_the_memory_of_the_machine(
    tmp_path: Path, files: dict[str, str], memory: int
) -> None:
    root = machine(tmp_path / "root", **files)
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text("MemTotal:       16000000 kB\nMemFree:  1 kB\n")
    assert facts.probe(root).memory_bytes == memory


def test_nvml_is_read_in_a_container_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the values of a V100; the driver version is a bytes object, as in older versions of NVML."""
    readings = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: b"535.129.03",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetName": lambda _: "Tesla V100-SXM2-32GB",
        "nvmlDeviceGetCudaComputeCapability": lambda _: (7, 0),
    }
    for name, reading in readings.items():
        monkeypatch.setattr(f"pynvml.{name}", reading)
    root = machine(tmp_path / "root", sys__module__nvidia__version="535.129.03\n")
    card(root, "Tesla V100-SXM2-32GB")
    machine_facts = facts.probe(root)
    assert (machine_facts.nvidia_driver, machine_facts.gpus) == ("535.129.03", (Gpu("Tesla V100-SXM2-32GB", "7.0"),))
    assert facts.probe(tmp_path / "nothing").gpus == (Gpu("Tesla V100-SXM2-32GB", "7.0"),), "as on WSL, without /proc"


def test_nvml_that_fails_after_its_start_yields_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", fail)
    assert facts.probe(tmp_path / "nothing").gpus == ()
