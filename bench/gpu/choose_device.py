"""Choose the device of a run from the name that the user gives and from the devices that torch can use."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from bench.gpu import diagnosis
from provision.core import layout
from provision.core.errors import BlockedError, SpecError

if TYPE_CHECKING:
    from bench.gpu.diagnosis import Machine


def choose(name: str, machine: Machine, torch_facts: dict[str, Any] | None) -> str:
    """Return the device of a run: "cpu", "cuda:N" or "mps".

    Args:
        name: "auto", "cpu", "cuda", "cuda:N" or "mps". "cuda" is cuda:0. "auto" is a GPU if torch can use one, else the
            CPU.
        machine: the facts of the host and which GPUs it exposes.
        torch_facts: what `worker_process.query` returned; None if torch was not queried.

    Raises:
        SpecError: `name` is not a device name.
        BlockedError: the named device cannot be used; the message gives the cause and the remedy.
    """
    check_name(name)
    if name == "cpu" or (name == "auto" and torch_facts is None):
        return "cpu"
    answer = torch_facts or {}
    if "error" in answer:
        verify = layout.next_command("verify")
        raise BlockedError(
            f"the environment's torch does not start. Run `{verify}`. Its error output:\n{answer['error']}"
        )
    if name == "mps":
        if not answer.get("mps"):
            raise BlockedError("this torch finds no Apple GPU (MPS). Use --device cpu.")
        return "mps"
    index = int(name.partition(":")[2] or 0)
    fault = diagnosis.diagnose(machine, answer, index)
    if name == "auto":
        if fault is None:
            return "cuda:0"
        return "mps" if answer.get("mps") and machine.facts.system == "darwin" else "cpu"
    if fault is not None:
        raise BlockedError(fault.text)
    count = len(answer["devices"])
    if index >= count:
        raise BlockedError(
            f"cuda:{index} does not exist: the last GPU that torch lists is cuda:{count - 1}. Use --device cuda:0."
        )
    return f"cuda:{index}"


def check_name(name: str) -> None:
    """Check that a text has the form of a device name; whether the device exists is not checked.

    Raises:
        SpecError: no device has a name of this form; the message lists the valid forms.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise SpecError(f"unknown device {name!r}; use one of: auto, cpu, cuda, cuda:N, mps.")
