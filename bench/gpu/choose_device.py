"""Which device a run uses."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from bench.gpu import diagnosis
from provision.core import layout
from provision.core.errors import BlockedError, SpecError

if TYPE_CHECKING:
    from bench.gpu.diagnosis import Machine


def choose(wanted: str, site: Machine, found: dict[str, Any] | None) -> str:
    """The device of a run.

    Args:
        wanted: "auto", "cpu", "cuda", "cuda:N" or "mps".
        site: the host, and what it shows of its cards.
        found: what the interpreter's torch says (`worker_process.query`), None where it was not asked.

    Raises:
        SpecError: no such device name.
        BlockedError: a wanted device cannot be used; the message tells the cause and the fix.
    """
    check_name(wanted)
    if wanted == "cpu" or (wanted == "auto" and found is None):
        return "cpu"
    answer = found or {}
    if "error" in answer:
        verify = layout.next_command("verify")
        raise BlockedError(f"the environment's torch does not start. Run `{verify}`. It said:\n{answer['error']}")
    if wanted == "mps":
        if not answer.get("mps"):
            raise BlockedError("this torch sees no Apple GPU (MPS). Use --device cpu.")
        return "mps"
    index = int(wanted.partition(":")[2] or 0)
    why_not = diagnosis.cause(site, answer, index)
    if wanted == "auto":
        if why_not is None:
            return "cuda:0"
        return "mps" if answer.get("mps") and site.machine.system == "darwin" else "cpu"
    if why_not is not None:
        raise BlockedError(why_not.text)
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
