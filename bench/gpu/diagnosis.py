"""Why torch cannot use a card of NVIDIA's: one cause of many, by what the machine shows, and what mends it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.gpu import nvml
from bench.gpu.device_nodes import CONTROL, NUMBERED, GpuVisibility, look
from provision.config import toml
from provision.config import torch as torch_config
from provision.core.errors import SpecError
from provision.host import torch_build
from provision.host.facts import Gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from provision.config.torch import TorchSpec
    from provision.host.facts import HostFacts

# The oldest driver for a major version of CUDA that torch.toml has no variant of (source: NVIDIA's table of CUDA's
# minor version compatibility).
_OLDER_CUDA = {"11": "450.80.02"}
_ELSE = "Or use --device cpu."


@dataclass(frozen=True)
class Machine:
    """A machine, what it shows of its cards, and the builds of torch that could be installed on it (by `locked`)."""

    machine: HostFacts
    seen: GpuVisibility = field(default_factory=GpuVisibility)
    torch: TorchSpec | None = None
    locked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """Why a card cannot be used: a short name of the cause, what is so, and what to do."""

    name: str
    said: str
    fix: str

    @property
    def text(self) -> str:
        """For a message."""
        return f"{self.said}. {self.fix}"


@dataclass(frozen=True)
class _Question:
    """A site, what torch said there, and of which card."""

    site: Machine
    found: Mapping[str, Any]
    index: int

    @property
    def card(self) -> str:
        gpus = self.site.machine.gpus
        return gpus[min(self.index, len(gpus) - 1)].name if gpus else "an NVIDIA card"

    @property
    def torch(self) -> str:
        return f"torch {self.found.get('torch')}"

    @property
    def driver(self) -> str | None:
        return self.site.machine.nvidia_driver


def site(machine: HostFacts, envs: Path) -> Machine:
    """A machine as it is now, with the builds that a folder of environments has locks for.

    Raises:
        SpecError: the folder's torch.toml is wrong.
    """
    file = envs / "torch.toml"
    torch = toml.load(file, torch_config.TorchSpec) if file.is_file() else None
    return Machine(machine, look(), torch, tuple(sorted({lock.stem for lock in envs.glob("*/*.lock")})))


def cause(place: Machine, found: Mapping[str, Any], index: int = 0) -> Diagnosis | None:
    """Why torch cannot use a card there, or None when it can.

    What torch can use is not asked further. Else what lies deepest comes first: the card and its driver, the way to it
    (nodes and libraries), then the build of torch.

    Args:
        place: the machine.
        found: what the interpreter's torch says (`worker_process.query`).
        index: of the card, as torch counts.
    """
    asked = _Question(place, found, index)
    if found.get("available"):
        devices = found.get("devices", [])
        return _no_code(asked, devices[index]) if index < len(devices) else None
    return next(filter(None, (ask(asked) for ask in _CAUSES)), None) or _unexplained(asked)


def _no_driver(asked: _Question) -> Diagnosis | None:
    if asked.driver is not None:
        return None
    bus = asked.site.seen.on_bus
    if not bus:
        seen = ", and no card of NVIDIA's is on its bus" if asked.site.machine.system == "linux" else ""
        fix = "Use --device cpu, or a host with a card."
        return Diagnosis("no card", f"no NVIDIA driver is loaded on this machine{seen}", fix)
    where = "on the container's host" if asked.site.seen.contained else "here"
    return Diagnosis(
        "no driver",
        f"a card of NVIDIA's is on the bus ({bus[0]}), and no driver is loaded for it",
        f"Install NVIDIA's driver {where}, or load it (`sudo modprobe nvidia`). {_ELSE}",
    )


def _mismatch(asked: _Question) -> Diagnosis | None:
    if asked.site.seen.library != nvml.MISMATCH:
        return None
    again = "Start the container anew: it still has" if asked.site.seen.contained else "Restart the machine: it has"
    return Diagnosis(
        "driver mismatch",
        f"the kernel runs driver {asked.driver}, and its libraries are of another version (NVML: driver/library "
        "version mismatch)",
        f"{again} both versions since the driver was updated. {_ELSE}",
    )


def _no_node(asked: _Question) -> Diagnosis | None:
    seen = asked.site.seen
    there = {node.name for node in seen.nodes}
    # The driver makes these when CUDA first asks for them: a torch without CUDA has not.
    missing = [name for name in CONTROL if name not in there] if asked.found.get("cuda") else []
    if not any(NUMBERED.fullmatch(name) for name in there):
        missing.insert(0, "nvidia0")
    # A driver that the kernel does not show (WSL's) has other ways than nodes: then its own word on cards counts.
    if (not seen.loaded and asked.site.machine.gpus) or not missing:
        return None
    shown = ", ".join(f"/dev/{name}" for name in missing)
    fix = "Start the container with its GPUs (`docker run --gpus all`, with NVIDIA's Container Toolkit on the host)."
    if not seen.contained:
        fix = f"Make them: `sudo nvidia-modprobe -c 0 -u`. Where this is a container: {fix[0].lower()}{fix[1:]}"
    said = f"the NVIDIA driver {asked.driver} is loaded, but no card is in reach: no {shown}"
    return Diagnosis("no node", said, f"{fix} {_ELSE}")


def _closed(asked: _Question) -> Diagnosis | None:
    """A node that CUDA needs and that does not open; of the cards' own, one that opens is enough."""
    nodes = asked.site.seen.nodes
    cards = [node for node in nodes if NUMBERED.fullmatch(node.name)]
    needed = [node for node in nodes if node.name in CONTROL]
    needed += [] if any(node.fault is None for node in cards) else cards[:1]
    for node in needed:
        if node.fault == "EACCES":
            return Diagnosis(
                "permission",
                f"/dev/{node.name} is not for this user (mode {node.mode}, {node.owner})",
                "Join its group, where that may use it (`sudo usermod -aG GROUP $USER`, then log in again), or open it "
                f"to all: `sudo chmod 666 /dev/nvidia*`. {_ELSE}",
            )
        if node.fault == "EPERM":
            return Diagnosis(
                "device rules",
                f"/dev/{node.name} is here, and this container may not use it (its device rules)",
                "Start the container anew with its GPUs (`docker run --gpus all`): the node alone is not enough, and a "
                f"reload of systemd on the host takes a running container's devices away. {_ELSE}",
            )
        if node.fault is not None:
            return Diagnosis(
                "dead node",
                f"/dev/{node.name} does not open ({node.fault}): its driver has failed, or the card has left the bus",
                f"`sudo dmesg | grep -i nvrm` tells which. Restart the machine, or ask for another card. {_ELSE}",
            )
    return None


def _cpu_build(asked: _Question) -> Diagnosis | None:
    if asked.found.get("cuda"):
        return None
    return Diagnosis("torch without CUDA", f"{asked.card} is here, but {asked.torch} is a CPU-only build", _take(asked))


def _old_driver(asked: _Question) -> Diagnosis | None:
    needed = _least_driver(asked.site.torch, str(asked.found.get("cuda")))
    if asked.driver is None or needed is None or not torch_build.is_older(asked.driver, needed):
        return None
    return Diagnosis(
        "driver too old",
        f"{asked.torch} is built for CUDA {asked.found.get('cuda')}, which needs driver {needed} or newer; here is "
        f"{asked.driver}",
        f"Update the driver to {needed} or newer, or take a build that runs with this one: {_take(asked)}",
    )


def _unseen(asked: _Question) -> Diagnosis | None:
    """A variable that hides every card: CUDA stops at the first entry that is no card."""
    visible = asked.site.seen.visible
    if visible is None or re.match(r"\s*(\d|GPU-|MIG-)", visible):
        return None
    return Diagnosis(
        "hidden by a variable",
        f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every card",
        f"`unset CUDA_VISIBLE_DEVICES`. {_ELSE}",
    )


def _uncut(asked: _Question) -> Diagnosis | None:
    if not asked.site.seen.uncut:
        return None
    where = "on the container's host" if asked.site.seen.contained else "here"
    return Diagnosis(
        "no instance",
        f"{asked.card} is set to be used in instances (MIG), and none of them is here",
        f"Make one {where} (`sudo nvidia-smi mig -lgip` tells which there are, `sudo nvidia-smi mig -cgi PROFILE -C` "
        f"makes it), or use the card as a whole: `sudo nvidia-smi -mig 0`. {_ELSE}",
    )


def _no_fabric(asked: _Question) -> Diagnosis | None:
    """CUDA's error 802, of hosts whose cards are joined by switches (source: CUDA's cudaErrorSystemNotReady)."""
    refusal = str(asked.found.get("refusal") or "")
    if "802" not in refusal and "system not yet initialized" not in refusal:
        return None
    return Diagnosis(
        "fabric manager",
        f"the cards of this host are joined by switches that nobody has set up ({refusal})",
        "Start NVIDIA's Fabric Manager on the host, of the driver's own version: `sudo systemctl start "
        f"nvidia-fabricmanager`. {_ELSE}",
    )


def _no_library(asked: _Question) -> Diagnosis | None:
    if asked.site.seen.library != nvml.NO_LIBRARY:
        return None
    return Diagnosis(
        "no libraries",
        f"driver {asked.driver} is loaded and the card's nodes are here, but not the driver's libraries",
        "A container: start it with `--gpus all` and NVIDIA_DRIVER_CAPABILITIES=compute,utility. Else install the "
        f"driver's libraries of the same version. {_ELSE}",
    )


def _unexplained(asked: _Question) -> Diagnosis:
    refusal = asked.found.get("refusal")
    why = f"it says: {refusal}" if refusal else "it does not say why"
    return Diagnosis(
        "unexplained",
        f"{asked.torch}, built for CUDA {asked.found.get('cuda')}, cannot use {asked.card} with driver {asked.driver}; "
        f"{why}",
        f"`nvidia-smi` and `sudo dmesg | grep -i nvrm` may tell more. {_ELSE}",
    )


_CAUSES: tuple[Callable[[_Question], Diagnosis | None], ...] = (
    _no_driver,
    _mismatch,
    _no_node,
    _closed,
    _cpu_build,
    _old_driver,
    _unseen,
    _uncut,
    _no_fabric,
    _no_library,
)


def _no_code(asked: _Question, device: Mapping[str, Any]) -> Diagnosis | None:
    """A card for which this torch has no machine code."""
    capability = str(device["capability"])
    names = [str(name) for name in asked.found.get("architectures", [])]
    if supported(capability, names):
        return None
    known = [(int(major), int(minor)) for name in names for major, minor in re.findall(r"_(\d+)(\d)[af]?$", name)]
    card = tuple(int(part) for part in capability.split("."))
    is_older = bool(known) and card < min(known)
    age = "is too old for" if is_older else "is too new for" if known and card > max(known) else "has no code in"
    return Diagnosis(
        "card too old" if is_older else "no code for the card",
        f"{device['name']} has compute capability {capability} and {age} {asked.torch}, which carries machine code for "
        f"{', '.join(names) or 'none'}",
        _take(asked, device),
    )


def supported(capability: str, architectures: list[str]) -> bool:
    """Whether one of torch's architectures runs on a card: the same major and no newer minor, or PTX of an older one.

    Source: NVIDIA's CUDA programming guide, binary and PTX compatibility.
    """
    major, minor = (int(part) for part in capability.split("."))
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if not found:
            continue
        built = (int(found.group(2)), int(found.group(3)))
        if found.group(1) == "sm" and built[0] == major and built[1] <= minor:
            return True
        if found.group(1) == "compute" and built <= (major, minor):
            return True
    return False


def _take(asked: _Question, device: Mapping[str, Any] | None = None) -> str:
    """Which build to take, for a card whose compute capability torch has told; where none fits, why that is so."""
    machine, torch = asked.site.machine, asked.site.torch
    if device is not None:
        machine = replace(machine, gpus=(Gpu(str(device["name"]), str(device["capability"])),))
    if torch is None:
        return f"Install a build of torch with CUDA that runs with driver {machine.nvidia_driver}. {_ELSE}"
    try:
        choice = torch_build.choose(machine, torch, "auto", list(asked.site.locked))
    except SpecError as error:
        return f"No build that is locked here fits: {error} {_ELSE}"
    chosen = choice.variants[0]
    if not chosen.architectures:
        return f"No build that is locked here fits: {choice.reason}. {_ELSE}"
    return f"`provision env create --variant {chosen.name}` (torch {chosen.torch}). {_ELSE}"


def _least_driver(torch: TorchSpec | None, cuda: str) -> str | None:
    """The oldest driver that a build for this CUDA starts with: of its major version; None where nothing tells."""
    major = cuda.partition(".")[0]
    known = [variant for variant in (torch.variant if torch is not None else []) if variant.driver is not None]
    same = [variant.driver for variant in known if re.fullmatch(rf"cu{major}\d", variant.name)]
    return next(iter(same), _OLDER_CUDA.get(major))
