"""What a machine shows of its NVIDIA cards to whoever would use them: bus, nodes of /dev, the driver's library."""

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

CONTROL = ("nvidiactl", "nvidia-uvm")  # what CUDA opens beside a card's own node
NUMBERED = re.compile(r"nvidia\d+")
_VENDOR = "0x10de"  # NVIDIA, on the PCI bus
_DISPLAY = "0x03"  # the class of what computes or draws: a card's sound and its hubs have others


@dataclass(frozen=True)
class DeviceNode:
    """A file of /dev that CUDA opens; `fault`: why it does not open, as the system names it (EACCES), else None."""

    name: str
    fault: str | None = None
    mode: str = ""
    owner: str = ""


@dataclass(frozen=True)
class GpuVisibility:
    """What a machine shows of its cards, beside its facts.

    `on_bus`: their PCI addresses. `loaded`: the kernel has the driver. `library`: the number with which NVML refuses,
    None where it answers. `uncut`: a card is set to be used in instances (MIG), and has none. `visible`:
    CUDA_VISIBLE_DEVICES. `contained`: this is a container, as far as that shows.
    """

    on_bus: tuple[str, ...] = ()
    loaded: bool = False
    nodes: tuple[DeviceNode, ...] = ()
    library: int | None = None
    uncut: bool = False
    visible: str | None = None
    contained: bool = False


def look(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> GpuVisibility:
    """See what there is; each node is opened once, and nothing else is done to it.

    Args:
        root: where /sys, /proc and /dev are; another folder in tests.
        environ: the variables of the process that will use the card.
    """
    marks = (root / ".dockerenv", root / "run/.containerenv")
    return GpuVisibility(
        on_bus=tuple(sorted(_on_bus(root))),
        loaded=(root / "sys/module/nvidia").exists() or (root / "proc/driver/nvidia/version").exists(),
        nodes=tuple(_nodes(root / "dev")),
        library=nvml.refusal(),
        uncut=nvml.has_no_instance(),
        visible=environ.get("CUDA_VISIBLE_DEVICES"),
        contained=any(mark.exists() for mark in marks) or bool({"container", "KUBERNETES_SERVICE_HOST"} & set(environ)),
    )


def _on_bus(root: Path) -> Iterator[str]:
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
            yield _closed_node(file, errno.errorcode.get(error.errno or 0, str(error)))
        else:
            yield DeviceNode(file.name)


def _closed_node(file: Path, fault: str) -> DeviceNode:
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
