"""Finds the dtypes that a device has kernels for and its vector width, and fits a suite to them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.core.protocol import PrecisionQuery
from bench.core.result import Precision
from bench.core.worker_events import DeviceCapabilities, PrecisionProbe
from bench.launch import worker_process
from bench.run import cases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.launch.received_events import ReceivedEvents
    from bench.run.cases import Suite

FP32 = "fp32"
# So many times slower than fp32, a dtype has no kernels, whatever torch says. Less tells nothing: with AMX the probe's
# small convolution is 1.6 times slower in bf16, and a whole image twice as fast (measured on a 2-core Xeon).
_SEVERAL = 4.0
_SECONDS = 120.0
_NVIDIA = "tf32"  # a format of NVIDIA's cards alone
# Which one is taken where a device has several: what programs use there. Not the faster one: a probe varies.
_USUAL = {"cpu": ("bf16", "fp16"), "cuda": ("fp16", "bf16"), "mps": ("fp16", "bf16")}


@dataclass(frozen=True)
class DtypeSupport:
    """Hold the answer of a device.

    `rates`: {dtype: FLOPs a second}. `lanes`: as a suite's shapes have it. `fault`: why there is no answer. `tf32`:
    whether a card has it; None where that is not known.
    """

    device: str
    precisions: tuple[Precision, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    lanes: float | None = None
    fault: str | None = None
    tf32: bool | None = None

    @property
    def kind(self) -> str:
        """The kind of the device."""
        return self.device.partition(":")[0]

    @property
    def means(self) -> cases.Capabilities:
        """Return the dtypes and the width that a suite is unrolled with; a dtype of which nothing is known is tried."""
        without = {each.dtype for each in self.precisions if not each.kernels}
        if self.kind != "cuda" or self.tf32 is False:
            without.add(_NVIDIA)
        lower = next((name for name in _USUAL[self.kind] if name not in without), None)
        return cases.Capabilities(lower, frozenset(without), self.lanes)


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
    on_received: Callable[[ReceivedEvents], None] = lambda _: None,
) -> DtypeSupport:
    """Ask the interpreter's torch, and confirm it by short convolutions, in a process of their own.

    A kernel that ends the process (SIGILL) is a fact of its dtype; the others are asked in a new process. A hang, a
    lack of memory or a driver's failure is none: the dtype is tried, unless torch reports that it has no kernels.

    Args:
        python: the interpreter.
        device: as a case names it.
        cpus: how many the control group grants, if it does.
        dtypes: the low ones.
        on_received: called with the events so far, at each line of the worker and twice a second.
    """
    left = [FP32, *dtypes]
    probes: dict[str, PrecisionProbe] = {}
    capabilities = DeviceCapabilities()
    fault = None
    while left:
        query = PrecisionQuery(device, tuple(left), cpus)
        with worker_process.Worker(query, python, Path(os.devnull), on_received) as worker:
            worker.listen(time.monotonic() + _SECONDS)
        received = worker.received
        capabilities = received.capabilities or capabilities
        probes |= {probe.dtype: probe for probe in received.precisions}
        left = [name for name in left if name not in probes or not probes[name].is_finished]
        if received.phase not in left:  # it did not reach a dtype, or reported all of them
            fault = worker.fault() if left else None
            break
        is_its_own = worker.code is not None and worker.code != -signal.SIGKILL
        begun = probes.get(received.phase, PrecisionProbe(received.phase, None))
        probes[begun.dtype] = replace(begun, fault=worker.fault().splitlines()[0], unsupported=is_its_own)
        left.remove(begun.dtype)
    rates = {name: probe.rate for name, probe in probes.items() if probe.rate}
    precisions = []
    for name in [name for name in dtypes if name in probes and name not in left]:
        slower = rates[FP32] / rates[name] if FP32 in rates and name in rates else None
        kernels = _has_kernels(probes[name], slower)
        precisions.append(Precision(name, kernels, rates.get(name), slower, probes[name].fault))
    tf32 = bool(capabilities.tf32) if capabilities.tf32 is not None else None
    return DtypeSupport(device, tuple(precisions), tuple(rates.items()), _lanes(capabilities, cpus), fault, tf32)


def _lanes(capabilities: DeviceCapabilities, cpus: float | None) -> float | None:
    """Return how many fp32 numbers a CPU computes at once: vector width times threads; None for another device."""
    if capabilities.lanes is None or capabilities.threads is None:
        return None
    threads = float(capabilities.threads)
    return capabilities.lanes * (min(threads, cpus) if cpus else threads)


def _has_kernels(probe: PrecisionProbe, slower: float | None) -> bool:
    """Return whether torch's report and the probe agree on kernels.

    A dtype that torch reports as emulated counts where it is as fast as fp32.
    """
    if probe.fault is not None:
        return not probe.unsupported and probe.kernels is not False
    if slower is None:
        return bool(probe.kernels)
    return slower <= (1.0 if probe.kernels is False else _SEVERAL)


def notes(known: DtypeSupport, suite: Suite, dtypes: Sequence[str]) -> Iterator[str]:
    """Say what a device's means change in a suite: which dtypes are left out, what "lower" is, which shapes are taken.

    Args:
        known: what was found.
        suite: the suite.
        dtypes: those that are asked for by name.
    """
    if known.fault is not None:
        why = known.fault.splitlines()[0]
        yield f"which dtypes {known.device} has kernels for is not known: {why}. {known.means.lower} is tried"
        return
    blocks = [block for block in suite.matrix or () if (block.cpu if known.device == "cpu" else block.gpu)]
    if known.lanes is not None and any(len(block.cpu or ()) > 1 for block in blocks):
        yield f"sizes are chosen for a CPU that computes {known.lanes:g} numbers of fp32 at once (threads x vector)"
    if dtypes:
        return
    names = {name for block in blocks for name in block.dtype}
    asked = names | (set(cases.LOW) if cases.LOWER in names else set())
    for each in known.precisions:
        if each.dtype in asked and not each.kernels:
            yield left_out(each, known.device)
        elif each.dtype in asked and each.fault is not None:
            yield f"{each.dtype}: its probe ended ({each.fault}), tried all the same"
    if _NVIDIA in names and _NVIDIA in known.means.without:
        yield f"{_NVIDIA}: a format of NVIDIA's cards since Ampere, left out"
    if cases.LOWER in names:
        lower = known.means.lower
        yield f"lower precision here: {lower or 'none, fp32 alone has kernels'}"


def left_out(found: Precision, device: str) -> str:
    """Say why a dtype is left out."""
    what = "CPU" if device == "cpu" else "card"
    if found.fault is not None:
        return f"{found.dtype}: its probe ended ({found.fault}), left out"
    slower = f"about {_round(found.slower)} times slower than fp32, " if found.slower is not None else ""
    return f"{found.dtype}: no kernels on this {what}, {slower}left out"


def _round(times: float) -> str:
    return f"{times:.1f}" if times < 10 else f"{round(times, -1 if times >= 20 else 0):.0f}"
