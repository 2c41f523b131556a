"""Finds the dtypes that a device has kernels for and its vector width, and fits a suite to them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import cases, runner
from bench.result import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.cases import Suite
    from bench.hearing import Heard

FP32 = "fp32"
_SEVERAL = 4.0  # times slower than fp32: no kernels, whatever torch says
_SECONDS = 120.0
_NVIDIA = "tf32"  # a format of NVIDIA's cards alone
# Which one is taken where a device has several: what programs use there. Not the faster one: a probe varies.
_USUAL = {"cpu": ("bf16", "fp16"), "cuda": ("fp16", "bf16"), "mps": ("fp16", "bf16")}


@dataclass(frozen=True)
class Known:
    """Hold the answer of a device.

    `rates`: {dtype: FLOPs a second}. `lanes`: as a suite's shapes have it. `fault`: why there is no answer.
    """

    device: str
    precisions: tuple[Precision, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    lanes: float | None = None
    fault: str | None = None

    @property
    def means(self) -> cases.Means:
        """Return the dtypes and the width that a suite is unrolled with."""
        without = {each.dtype for each in self.precisions if not each.kernels}
        if not self.device.startswith("cuda"):
            without.add(_NVIDIA)
        have = [each.dtype for each in self.precisions if each.kernels]
        lower = next((name for name in _USUAL[self.device.partition(":")[0]] if name in have), None)
        return cases.Means(lower, frozenset(without), self.lanes)


def needed(suite: Suite, device: str, only_dtypes: Sequence[str]) -> bool:
    """Return whether a suite depends on the device's dtypes or width; asking costs an import of torch."""
    blocks = [block for block in suite.matrix or () if (block.cpu if device == "cpu" else block.gpu)]
    dtypes = {name for block in blocks for name in block.dtype}
    has_shapes = any(len(block.cpu or ()) > 1 for block in blocks) and device == "cpu"
    return has_shapes or (bool(dtypes & {cases.LOWER, *cases.LOW}) and not only_dtypes)


def ask(
    python: Path,
    device: str,
    *,
    cpus: float | None = None,
    dtypes: Sequence[str] = cases.LOW,
    tell: Callable[[Heard], None] = lambda _: None,
) -> Known:
    """Ask the interpreter's torch, and confirm it by short convolutions, in a process of their own.

    A kernel that ends the process (SIGILL) or hangs is a fact of its dtype; the others are asked in a new process.

    Args:
        python: the interpreter.
        device: as a case names it.
        cpus: how many the control group grants, if it does.
        dtypes: the low ones.
        tell: called with what is known, at each line of the worker and twice a second.
    """
    left = [FP32, *dtypes]
    told: dict[str, dict[str, Any]] = {}
    faults: dict[str, str] = {}
    computes: dict[str, int] = {}
    fault = None
    while left:
        with runner.Worker({"precisions": device, "dtypes": left}, python, Path(os.devnull), tell) as worker:
            worker.listen(time.monotonic() + _SECONDS)
        heard = worker.heard
        computes = heard.computes or computes
        told |= {str(each.get("dtype")): each for each in heard.precisions}
        left = [name for name in left if name not in told]
        if heard.phase not in left:  # it did not reach a dtype, or reported all of them
            fault = worker.fault() if left else None
            break
        faults[heard.phase] = worker.fault().splitlines()[0]
        left.remove(heard.phase)
    rates = {name: float(each["rate"]) for name, each in told.items() if each.get("rate")}
    lanes = None
    if computes:
        threads = float(computes["threads"])
        lanes = computes["lanes"] * (min(threads, cpus) if cpus else threads)
    found = []
    for name in dtypes:
        if name in told or name in faults:
            slower = rates[FP32] / rates[name] if FP32 in rates and name in rates else None
            why = faults.get(name) or told[name].get("fault")
            claimed = told[name].get("kernels") if name in told else None
            found.append(Precision(name, _has_kernels(claimed, slower, why), rates.get(name), slower, why))
    return Known(device, tuple(found), tuple(rates.items()), lanes, fault)


def _has_kernels(claimed: bool | None, slower: float | None, fault: str | None) -> bool:
    """Torch's word and the probe's: a dtype that torch calls emulated has to be as fast as fp32 to count."""
    if fault is not None:
        return False
    if slower is None:
        return bool(claimed)
    return slower <= (1.0 if claimed is False else _SEVERAL)


def notes(known: Known, suite: Suite, dtypes: Sequence[str]) -> Iterator[str]:
    """Say what a device's means change in a suite: which dtypes are left out, what "lower" is, which shapes are taken.

    Args:
        known: what was found.
        suite: the suite.
        dtypes: those that are asked for by name.
    """
    if known.fault is not None:
        yield f"which dtypes {known.device} has kernels for is not known: {known.fault.splitlines()[0]}"
        return
    blocks = [block for block in suite.matrix or () if (block.cpu if known.device == "cpu" else block.gpu)]
    names = {name for block in blocks for name in block.dtype}
    if dtypes:
        return
    asked = names | (set(cases.LOW) if cases.LOWER in names else set())
    yield from (left_out(each, known.device) for each in known.precisions if each.dtype in asked and not each.kernels)
    if _NVIDIA in names and _NVIDIA in known.means.without:
        yield f"{_NVIDIA}: a format of NVIDIA's cards, left out"
    if cases.LOWER in names:
        lower = known.means.lower
        yield f"lower precision here: {lower or 'none, fp32 alone has kernels'}"
    if known.lanes is not None and any(len(block.cpu or ()) > 1 for block in blocks):
        yield f"sizes are chosen for a CPU that computes {known.lanes:g} numbers of fp32 at once (threads x vector)"


def left_out(found: Precision, device: str) -> str:
    """Say why a dtype is left out."""
    what = "CPU" if device == "cpu" else "card"
    if found.fault is not None:
        return f"{found.dtype}: its probe ended ({found.fault}), left out"
    slower = f"about {_round(found.slower)} times slower than fp32, " if found.slower is not None else ""
    return f"{found.dtype}: no kernels on this {what}, {slower}left out"


def _round(times: float) -> str:
    return f"{times:.1f}" if times < 10 else f"{round(times, -1 if times >= 20 else 0):.0f}"
