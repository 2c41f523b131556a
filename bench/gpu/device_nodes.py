"""Read which NVIDIA GPUs a machine exposes: the PCI bus, the device nodes of /dev, and the driver's library (NVML)."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu import nvml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CONTROL = ("nvidiactl", "nvidia-uvm")  # CUDA opens these nodes besides those of the GPUs
NUMBERED = re.compile(r"nvidia\d+")  # the name of a GPU's own node, such as nvidia0
_VENDOR = "0x10de"  # NVIDIA's PCI vendor id
_DISPLAY = "0x03"  # the PCI class of display controllers; the audio and USB functions of a card have other classes


@dataclass(frozen=True)
class DeviceNode:
    """Record one file of /dev that CUDA opens.

    `fault`: the errno name of the failed `open`, such as EACCES; None if the file can be opened. `mode` (octal, such as
    "0660") and `owner` ("owner UID, group GID") are "" if the file can be opened.
    """

    name: str
    fault: str | None = None
    mode: str = ""
    owner: str = ""


@dataclass(frozen=True)
class GpuVisibility:
    """Record which NVIDIA GPUs a machine exposes to a process.

    `on_bus`: the PCI addresses of the GPUs. `loaded`: the kernel has loaded NVIDIA's driver. `nodes`: the device nodes
    of NVIDIA in /dev. `nvml_error`: the error number of nvmlInit; None if it succeeds. `lacks_mig_instance`: a GPU is
    in MIG mode and has no instance. `visible`: the value of CUDA_VISIBLE_DEVICES; None if it is not set.
    `in_container`: this process runs in a container.
    """

    on_bus: tuple[str, ...] = ()
    loaded: bool = False
    nodes: tuple[DeviceNode, ...] = ()
    nvml_error: int | None = None
    lacks_mig_instance: bool = False
    visible: str | None = None
    in_container: bool = False


def read_visibility(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> GpuVisibility:
    """Read which GPUs this machine exposes. Each device node is opened and closed once; nothing is changed.

    Args:
        root: the folder that contains /sys, /proc and /dev; tests pass another one.
        environ: the environment variables of the process that will use the GPU.
    """
    marks = (root / ".dockerenv", root / "run/.containerenv")
    return GpuVisibility(
        on_bus=tuple(sorted(_pci_addresses(root))),
        loaded=(root / "sys/module/nvidia").exists() or (root / "proc/driver/nvidia/version").exists(),
        nodes=tuple(_nodes(root / "dev")),
        nvml_error=nvml.start_error(),
        lacks_mig_instance=nvml.lacks_mig_instance(),
        visible=environ.get("CUDA_VISIBLE_DEVICES"),
        in_container=any(mark.exists() for mark in marks)
        or bool({"container", "KUBERNETES_SERVICE_HOST"} & set(environ)),
    )


def _pci_addresses(root: Path) -> Iterator[str]:
    for folder in (root / "sys/bus/pci/devices").glob("*"):
        if _read(folder / "vendor") == _VENDOR and _read(folder / "class").startswith(_DISPLAY):
            yield folder.name


def _nodes(folder: Path) -> Iterator[DeviceNode]:
    for file in sorted(folder.glob("nvidia*")):
        if file.name not in CONTROL and not NUMBERED.fullmatch(file.name):
            continue
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            yield _faulty_node(file, errno.errorcode.get(error.errno or 0, str(error)))
        else:
            yield DeviceNode(file.name)


def _faulty_node(file: Path, fault: str) -> DeviceNode:
    try:
        status = file.stat()
    except OSError:
        return DeviceNode(file.name, fault)
    return DeviceNode(
        file.name, fault, f"{stat.S_IMODE(status.st_mode):04o}", f"owner {status.st_uid}, group {status.st_gid}"
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
