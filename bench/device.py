"""Which device a run uses, and, where a wanted one cannot be used, which of the causes it is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from provision.errors import BlockedError, SpecError

if TYPE_CHECKING:
    from provision.facts import Facts


def choose(wanted: str, machine: Facts, found: dict[str, Any] | None) -> str:
    """The device of a run.

    Args:
        wanted: "auto", "cpu", "cuda", "cuda:N" or "mps".
        machine: what the host has.
        found: what the interpreter's torch says (`runner.query`), None where it was not asked.

    Raises:
        SpecError: no such device name.
        BlockedError: a wanted device cannot be used; the message tells the cause and the fix.
    """
    check_name(wanted)
    if wanted == "cpu" or (wanted == "auto" and found is None):
        return "cpu"
    answer = found or {}
    if "error" in answer:
        raise BlockedError(f"the environment's torch does not start. Run `make verify`. It said:\n{answer['error']}")
    if wanted == "mps":
        if not answer.get("mps"):
            raise BlockedError("this torch sees no Apple GPU (MPS). Use --device cpu.")
        return "mps"
    index = int(wanted.partition(":")[2] or 0)
    why_not = cuda_fault(machine, answer, index)
    if wanted == "auto":
        if why_not is None:
            return "cuda:0"
        return "mps" if answer.get("mps") and machine.system == "darwin" else "cpu"
    if why_not is not None:
        raise BlockedError(why_not)
    count = len(answer["devices"])
    if index >= count:
        raise BlockedError(f"there is no cuda:{index}: torch sees {count} of them (cuda:0 to cuda:{count - 1}).")
    return f"cuda:{index}"


def check_name(wanted: str) -> None:
    """Refuse a name that stands for no device.

    Raises:
        SpecError: it does not; the message lists what does.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", wanted):
        raise SpecError(f"unknown device {wanted!r}; there is: auto, cpu, cuda, cuda:N, mps.")


def cuda_fault(machine: Facts, found: dict[str, Any], index: int = 0) -> str | None:
    """Why torch cannot use an NVIDIA card here, or None when it can.

    The three causes have three fixes: no driver or card, a torch built without CUDA, and a card for which
    this torch carries no machine code.
    """
    if machine.nvidia_driver is None:
        return "no NVIDIA driver is loaded on this machine. Use --device cpu, or install the driver."
    if not machine.gpus:
        return (
            f"the NVIDIA driver {machine.nvidia_driver} is loaded, but no card is in reach (no /dev/nvidia0): "
            "start the container with its GPUs, or use --device cpu."
        )
    if not found.get("cuda"):
        return (
            f"{machine.gpus[0].name} is here, but torch {found.get('torch')} is a CPU-only build. "
            'Set variant = "auto" in host.toml and run `make setup`.'
        )
    if not found.get("available"):
        return (
            f"torch {found.get('torch')} is built for CUDA {found.get('cuda')} and cannot use driver "
            f"{machine.nvidia_driver}, which is too old for it. Update the driver, or use --device cpu."
        )
    for device in found.get("devices", [])[index : index + 1]:
        if not _supported(str(device["capability"]), [str(name) for name in found.get("architectures", [])]):
            return (
                f"{device['name']} has compute capability {device['capability']}, and torch {found.get('torch')} "
                f"carries machine code for {', '.join(found.get('architectures', []))} only. "
                "Use an older build of torch, or --device cpu."
            )
    return None


def _supported(capability: str, architectures: list[str]) -> bool:
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
