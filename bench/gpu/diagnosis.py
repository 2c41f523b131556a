"""Diagnose why torch cannot use an NVIDIA GPU, from what the machine exposes, and name the remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.gpu import nvml
from bench.gpu.device_nodes import CONTROL, NUMBERED, GpuVisibility, read_visibility
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

# {major version of CUDA: the oldest driver that runs it}, for versions that no variant in torch.toml uses. Source:
# NVIDIA's table of CUDA's minor version compatibility.
_OLDER_CUDA = {"11": "450.80.02"}
_USE_CPU = "Or use --device cpu."


@dataclass(frozen=True)
class Machine:
    """Record the facts of a host, which GPUs it exposes, and the builds of torch that could be installed on it.

    `torch`: the content of torch.toml; None if there is no such file. `locked`: the names of the variants (builds of
    torch) that have a lock file.
    """

    facts: HostFacts
    visibility: GpuVisibility = field(default_factory=GpuVisibility)
    torch: TorchSpec | None = None
    locked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """Record why torch cannot use a GPU: a short name of the cause, the problem, and the remedy."""

    name: str
    problem: str
    fix: str

    @property
    def text(self) -> str:
        """Return the problem and the remedy as one message."""
        return f"{self.problem}. {self.fix}"


@dataclass(frozen=True)
class _Evidence:
    """Hold the basis of a diagnosis.

    `torch_facts`: what `worker_process.query` returned. `index`: the number of the GPU in torch's order.
    """

    machine: Machine
    torch_facts: Mapping[str, Any]
    index: int

    @property
    def gpu_name(self) -> str:
        gpus = self.machine.facts.gpus
        return gpus[min(self.index, len(gpus) - 1)].name if gpus else "an NVIDIA card"

    @property
    def torch(self) -> str:
        return f"torch {self.torch_facts.get('torch')}"

    @property
    def driver(self) -> str | None:
        return self.machine.facts.nvidia_driver


def inspect_machine(facts: HostFacts, envs: Path) -> Machine:
    """Read which GPUs this machine exposes, and the builds of torch that could be installed on it.

    Args:
        facts: the facts of this machine.
        envs: the folder with torch.toml and the environment definitions.

    Raises:
        SpecError: torch.toml in that folder is not valid.
    """
    file = envs / "torch.toml"
    torch = toml.load(file, torch_config.TorchSpec) if file.is_file() else None
    return Machine(facts, read_visibility(), torch, tuple(sorted({lock.stem for lock in envs.glob("*/*.lock")})))


def diagnose(machine: Machine, torch_facts: Mapping[str, Any], index: int = 0) -> Diagnosis | None:
    """Return why torch cannot use a GPU of this machine, or None if it can.

    If torch can use CUDA, only the compute capability of the GPU is checked. Otherwise the first cause that applies is
    returned, in this order: GPU and driver, device nodes, the build of torch, CUDA_VISIBLE_DEVICES, MIG, NVSwitch,
    libraries.

    Args:
        machine: the machine.
        torch_facts: what `worker_process.query` returned.
        index: the number of the GPU in torch's order.
    """
    evidence = _Evidence(machine, torch_facts, index)
    if torch_facts.get("available"):
        devices = torch_facts.get("devices", [])
        return _no_code(evidence, devices[index]) if index < len(devices) else None
    return next(filter(None, (check(evidence) for check in _CHECKS)), None) or _unexplained(evidence)


def _no_driver(evidence: _Evidence) -> Diagnosis | None:
    if evidence.driver is not None:
        return None
    bus = evidence.machine.visibility.on_bus
    if not bus:
        on_bus = ", and no NVIDIA card is on its PCI bus" if evidence.machine.facts.system == "linux" else ""
        fix = "Use --device cpu, or a host with a card."
        return Diagnosis("no card", f"no NVIDIA driver is loaded on this machine{on_bus}", fix)
    where = "on the container's host" if evidence.machine.visibility.in_container else "here"
    return Diagnosis(
        "no driver",
        f"an NVIDIA card is on the PCI bus ({bus[0]}), but no driver is loaded for it",
        f"Install NVIDIA's driver {where}, or load it (`sudo modprobe nvidia`). {_USE_CPU}",
    )


def _driver_mismatch(evidence: _Evidence) -> Diagnosis | None:
    visibility = evidence.machine.visibility
    if visibility.nvml_error != nvml.MISMATCH:
        return None
    restart = "Start the container again" if visibility.in_container else "Restart the machine"
    return Diagnosis(
        "driver mismatch",
        f"the kernel runs driver {evidence.driver}, but the driver's libraries have another version (NVML: "
        "driver/library version mismatch)",
        f"{restart}: after an update of the driver, both versions are in use. {_USE_CPU}",
    )


def _missing_node(evidence: _Evidence) -> Diagnosis | None:
    visibility = evidence.machine.visibility
    names = {node.name for node in visibility.nodes}
    # The driver creates the nodes of CONTROL at the first use of CUDA; a CPU-only torch never uses CUDA.
    missing = [name for name in CONTROL if name not in names] if evidence.torch_facts.get("cuda") else []
    if not any(NUMBERED.fullmatch(name) for name in names):
        missing.insert(0, "nvidia0")
    # In WSL the kernel has no NVIDIA driver and CUDA needs no device nodes; a GPU in the facts shows that it works.
    if (not visibility.loaded and evidence.machine.facts.gpus) or not missing:
        return None
    paths = ", ".join(f"/dev/{name}" for name in missing)
    fix = "Start the container with its GPUs (`docker run --gpus all`, with NVIDIA's Container Toolkit on the host)."
    if not visibility.in_container:
        fix = f"Create them: `sudo nvidia-modprobe -c 0 -u`. If this is a container: {fix[0].lower()}{fix[1:]}"
    problem = f"the NVIDIA driver {evidence.driver} is loaded, but device nodes are missing: {paths}"
    return Diagnosis("no node", problem, f"{fix} {_USE_CPU}")


def _faulty_node(evidence: _Evidence) -> Diagnosis | None:
    """Return the diagnosis for a device node that CUDA needs and this user cannot open; None if there is none.

    CUDA needs every node of CONTROL, and the node of at least one GPU.
    """
    nodes = evidence.machine.visibility.nodes
    gpu_nodes = [node for node in nodes if NUMBERED.fullmatch(node.name)]
    needed = [node for node in nodes if node.name in CONTROL]
    needed += [] if any(node.fault is None for node in gpu_nodes) else gpu_nodes[:1]
    for node in needed:
        if node.fault == "EACCES":
            return Diagnosis(
                "permission",
                f"this user has no permission to open /dev/{node.name} (mode {node.mode}, {node.owner})",
                "Add the user to the node's group if the group has access (`sudo usermod -aG GROUP $USER`, then log in "
                f"again), or give all users access: `sudo chmod 666 /dev/nvidia*`. {_USE_CPU}",
            )
        if node.fault == "EPERM":
            return Diagnosis(
                "device rules",
                f"/dev/{node.name} exists, but the container's device rules forbid its use",
                "Start the container again with its GPUs (`docker run --gpus all`): the node alone is not enough. A "
                f"reload of systemd on the host also removes the devices of a running container. {_USE_CPU}",
            )
        if node.fault is not None:
            return Diagnosis(
                "dead node",
                f"/dev/{node.name} does not open ({node.fault}): the driver has failed, or the card has left the bus",
                "The output of `sudo dmesg | grep -i nvrm` shows which of the two. Restart the machine, or rent "
                f"another card. {_USE_CPU}",
            )
    return None


def _cpu_build(evidence: _Evidence) -> Diagnosis | None:
    if evidence.torch_facts.get("cuda"):
        return None
    return Diagnosis(
        "torch without CUDA",
        f"this machine has {evidence.gpu_name}, but {evidence.torch} is a CPU-only build",
        _build_advice(evidence),
    )


def _old_driver(evidence: _Evidence) -> Diagnosis | None:
    oldest = _oldest_driver(evidence.machine.torch, str(evidence.torch_facts.get("cuda")))
    if evidence.driver is None or oldest is None or not torch_build.is_older(evidence.driver, oldest):
        return None
    return Diagnosis(
        "driver too old",
        f"{evidence.torch} is built for CUDA {evidence.torch_facts.get('cuda')}, which needs driver {oldest} or newer; "
        f"this machine has {evidence.driver}",
        f"Update the driver to {oldest} or newer, or use a build for this driver: {_build_advice(evidence)}",
    )


def _hidden_devices(evidence: _Evidence) -> Diagnosis | None:
    """Return the diagnosis for a CUDA_VISIBLE_DEVICES that hides every GPU: its first entry is no GPU.

    CUDA ignores all entries from the first invalid one on.
    """
    visible = evidence.machine.visibility.visible
    if visible is None or re.match(r"\s*(\d|GPU-|MIG-)", visible):
        return None
    return Diagnosis(
        "hidden by a variable",
        f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every card",
        f"Run `unset CUDA_VISIBLE_DEVICES`, then the command again. {_USE_CPU}",
    )


def _no_instance(evidence: _Evidence) -> Diagnosis | None:
    if not evidence.machine.visibility.lacks_mig_instance:
        return None
    where = "on the container's host" if evidence.machine.visibility.in_container else "here"
    return Diagnosis(
        "no instance",
        f"{evidence.gpu_name} is in MIG mode and has no instance",
        f"Create one {where} (`sudo nvidia-smi mig -lgip` lists the profiles, `sudo nvidia-smi mig -cgi PROFILE -C` "
        f"creates an instance), or turn MIG mode off: `sudo nvidia-smi -mig 0`. {_USE_CPU}",
    )


def _no_fabric_manager(evidence: _Evidence) -> Diagnosis | None:
    """Return the diagnosis for CUDA's error 802 on hosts with NVSwitch (source: CUDA's cudaErrorSystemNotReady)."""
    refusal = str(evidence.torch_facts.get("refusal") or "")
    if "802" not in refusal and "system not yet initialized" not in refusal:
        return None
    return Diagnosis(
        "fabric manager",
        f"the NVSwitch fabric that connects the cards of this host is not set up ({refusal})",
        "Start NVIDIA's Fabric Manager of the driver's version on the host: `sudo systemctl start "
        f"nvidia-fabricmanager`. {_USE_CPU}",
    )


def _no_library(evidence: _Evidence) -> Diagnosis | None:
    if evidence.machine.visibility.nvml_error != nvml.NO_LIBRARY:
        return None
    return Diagnosis(
        "no libraries",
        f"driver {evidence.driver} is loaded and the device nodes exist, but the driver's libraries are missing",
        "In a container: start it with `--gpus all` and NVIDIA_DRIVER_CAPABILITIES=compute,utility. Else install the "
        f"driver's libraries of the same version. {_USE_CPU}",
    )


def _unexplained(evidence: _Evidence) -> Diagnosis:
    refusal = evidence.torch_facts.get("refusal")
    reason = f"its error: {refusal}" if refusal else "it gives no reason"
    return Diagnosis(
        "unexplained",
        f"{evidence.torch}, built for CUDA {evidence.torch_facts.get('cuda')}, cannot use {evidence.gpu_name} with "
        f"driver {evidence.driver}; {reason}",
        f"Read the output of `nvidia-smi` and `sudo dmesg | grep -i nvrm`. {_USE_CPU}",
    )


_CHECKS: tuple[Callable[[_Evidence], Diagnosis | None], ...] = (
    _no_driver,
    _driver_mismatch,
    _missing_node,
    _faulty_node,
    _cpu_build,
    _old_driver,
    _hidden_devices,
    _no_instance,
    _no_fabric_manager,
    _no_library,
)


def _no_code(evidence: _Evidence, device: Mapping[str, Any]) -> Diagnosis | None:
    """Return the diagnosis for a GPU for which this torch has no machine code; None if it has machine code."""
    capability = str(device["capability"])
    names = [str(name) for name in evidence.torch_facts.get("architectures", [])]
    if supported(capability, names):
        return None
    built_for = [(int(major), int(minor)) for name in names for major, minor in re.findall(r"_(\d+)(\d)[af]?$", name)]
    version = tuple(int(part) for part in capability.split("."))
    is_older = bool(built_for) and version < min(built_for)
    is_newer = bool(built_for) and version > max(built_for)
    relation = "is too old for" if is_older else "is too new for" if is_newer else "has no code in"
    return Diagnosis(
        "card too old" if is_older else "no code for the card",
        f"{device['name']} has compute capability {capability} and {relation} {evidence.torch}, which contains machine "
        f"code for {', '.join(names) or 'none'}",
        _build_advice(evidence, device),
    )


def supported(capability: str, architectures: list[str]) -> bool:
    """Return whether a build of torch for these architectures runs on a GPU of this compute capability.

    Machine code (sm_XY) runs on GPUs of the same major version with the same or a newer minor version. PTX (compute_XY)
    runs on GPUs of the same and every newer version. Source: NVIDIA's CUDA programming guide, binary and PTX
    compatibility.

    Args:
        capability: "major.minor", such as "9.0".
        architectures: names such as "sm_90" and "compute_80"; other names are ignored.
    """
    major, minor = (int(part) for part in capability.split("."))
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if not match:
            continue
        built_for = (int(match.group(2)), int(match.group(3)))
        if match.group(1) == "sm" and built_for[0] == major and built_for[1] <= minor:
            return True
        if match.group(1) == "compute" and built_for <= (major, minor):
            return True
    return False


def _build_advice(evidence: _Evidence, device: Mapping[str, Any] | None = None) -> str:
    """Return the command that installs a build of torch for this machine, or the reason why there is none.

    Args:
        evidence: the machine and its torch.
        device: {"name": ..., "capability": ...} of the GPU as torch reports them; None: the facts of the machine are
            used.
    """
    facts, torch = evidence.machine.facts, evidence.machine.torch
    if device is not None:
        facts = replace(facts, gpus=(Gpu(str(device["name"]), str(device["capability"])),))
    if torch is None:
        return f"Install a build of torch with CUDA that runs with driver {facts.nvidia_driver}. {_USE_CPU}"
    try:
        choice = torch_build.choose(facts, torch, "auto", list(evidence.machine.locked))
    except SpecError as error:
        return f"No locked build fits: {error} {_USE_CPU}"
    variant = choice.variants[0]
    if not variant.architectures:
        return f"No locked build fits: {choice.reason}. {_USE_CPU}"
    return f"`provision env create --variant {variant.name}` (torch {variant.torch}). {_USE_CPU}"


def _oldest_driver(torch: TorchSpec | None, cuda: str) -> str | None:
    """Return the oldest driver that runs a build for this version of CUDA; None if it is unknown."""
    major = cuda.partition(".")[0]
    variants = [variant for variant in (torch.variant if torch is not None else []) if variant.driver is not None]
    drivers = [variant.driver for variant in variants if re.fullmatch(rf"cu{major}\d", variant.name)]
    return next(iter(drivers), _OLDER_CUDA.get(major))
