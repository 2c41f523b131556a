"""Finds the dtypes that a device has kernels for and the width of a CPU, and adapts a suite to them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.core.result import Precision
from bench.core.worker_events import DeviceCapabilities, PrecisionProbe
from bench.core.worker_requests import PrecisionQuery
from bench.launch import worker_process
from bench.run import cases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.launch.received_events import ReceivedEvents
    from bench.run.cases import Suite

FP32 = "fp32"
# A dtype that is more than this many times slower than fp32 counts as one without kernels, even if torch reports some.
# A smaller factor proves nothing: with AMX the small convolution of the probe is 1.6 times slower in bf16, but a whole
# image is twice as fast (measured on a 2-core Xeon).
_NO_KERNEL_FACTOR = 4.0
_PROBE_SECONDS = 120.0
_TF32 = "tf32"  # a format of NVIDIA GPUs only
# {kind of device: the dtypes for "lower", the preferred one first}: the one that programs commonly use there. It is not
# the faster one of a probe, which would differ from run to run.
_PREFERRED = {"cpu": ("bf16", "fp16"), "cuda": ("fp16", "bf16"), "mps": ("fp16", "bf16")}


@dataclass(frozen=True)
class DtypeSupport:
    """Hold the dtypes that a device has kernels for, and the width of a CPU.

    `precisions`: the result of each probe of a dtype below fp32. `rates`: (dtype, FLOPs a second) of each successful
    probe. `lanes`: the fp32 numbers that a CPU computes at once; None if unknown. `fault`: the reason for which the
    dtypes could not be probed. `tf32`: whether a GPU has TF32; None if unknown.
    """

    device: str
    precisions: tuple[Precision, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    lanes: float | None = None
    fault: str | None = None
    tf32: bool | None = None

    @property
    def kind(self) -> str:
        """Return the kind of the device: "cpu", "cuda" or "mps"."""
        return self.device.partition(":")[0]

    @property
    def capabilities(self) -> cases.Capabilities:
        """Return what `cases.unroll` needs; a dtype that was not probed counts as supported."""
        without = {precision.dtype for precision in self.precisions if not precision.kernels}
        if self.kind != "cuda" or self.tf32 is False:
            without.add(_TF32)
        lower = next((name for name in _PREFERRED[self.kind] if name not in without), None)
        return cases.Capabilities(lower, frozenset(without), self.lanes)


def is_needed(suite: Suite, device: str, only_dtypes: Sequence[str]) -> bool:
    """Return whether the cases of a suite depend on the device's dtypes or width.

    Otherwise no probe has to import torch.
    """
    blocks = [block for block in suite.matrix or () if (block.cpu if device == "cpu" else block.gpu)]
    dtypes = {name for block in blocks for name in block.dtype}
    has_shapes = any(len(block.cpu or ()) > 1 for block in blocks) and device == "cpu"
    return has_shapes or (bool(dtypes & {cases.LOWER, *cases.LOW}) and not only_dtypes)


def probe(
    python: Path,
    device: str,
    *,
    cpus: float | None = None,
    dtypes: Sequence[str] = cases.LOW,
    on_received: Callable[[ReceivedEvents], None] = lambda _: None,
) -> DtypeSupport:
    """Probe each dtype under the interpreter, in a worker process, with torch's report and short convolutions.

    A kernel that kills the worker (SIGILL) proves that the device does not support its dtype; the other dtypes are
    probed in a new worker. A hang, a lack of memory or a driver error proves nothing. The dtype then counts as
    supported, unless torch reports that it has no kernels.

    Args:
        python: the interpreter of the worker.
        device: the device, such as "cpu" or "cuda:0".
        cpus: the CPU quota of the control group, in cores; None without a quota.
        dtypes: the dtypes to probe besides fp32.
        on_received: called with all events so far, after each line of the worker and twice a second.
    """
    pending = [FP32, *dtypes]
    probes: dict[str, PrecisionProbe] = {}
    capabilities = DeviceCapabilities()
    fault = None
    while pending:
        query = PrecisionQuery(device, tuple(pending), cpus)
        with worker_process.Worker(query, python, Path(os.devnull), on_received) as worker:
            worker.listen(time.monotonic() + _PROBE_SECONDS)
        received = worker.received
        capabilities = received.capabilities or capabilities
        probes |= {probe.dtype: probe for probe in received.precisions}
        pending = [name for name in pending if name not in probes or not probes[name].is_finished]
        if received.phase not in pending:  # the worker did not end within the probe of a dtype
            fault = worker.fault() if pending else None
            break
        is_crash = worker.code is not None and worker.code != -signal.SIGKILL
        unfinished = probes.get(received.phase, PrecisionProbe(received.phase, None))
        probes[unfinished.dtype] = replace(unfinished, fault=worker.fault().splitlines()[0], unsupported=is_crash)
        pending.remove(unfinished.dtype)
    rates = {name: probe.rate for name, probe in probes.items() if probe.rate}
    precisions = []
    for name in [name for name in dtypes if name in probes and name not in pending]:
        slower = rates[FP32] / rates[name] if FP32 in rates and name in rates else None
        kernels = _has_kernels(probes[name], slower)
        precisions.append(Precision(name, kernels, rates.get(name), slower, probes[name].fault))
    tf32 = bool(capabilities.tf32) if capabilities.tf32 is not None else None
    return DtypeSupport(device, tuple(precisions), tuple(rates.items()), _lanes(capabilities, cpus), fault, tf32)


def _lanes(capabilities: DeviceCapabilities, cpus: float | None) -> float | None:
    """Return the fp32 numbers that a CPU computes at once: vector width times threads; None for another device.

    `cpus`: the CPU quota, which limits the threads; None without a quota.
    """
    if capabilities.lanes is None or capabilities.threads is None:
        return None
    threads = float(capabilities.threads)
    return capabilities.lanes * (min(threads, cpus) if cpus else threads)


def _has_kernels(probe: PrecisionProbe, slower: float | None) -> bool:
    """Return whether a device has kernels for a dtype, by torch's report and the probe.

    A dtype without kernels by torch's report counts if its convolution is as fast as in fp32. `slower`: the time in
    this dtype as a multiple of the time in fp32; None if it was not measured.
    """
    if probe.fault is not None:
        return not probe.unsupported and probe.kernels is not False
    if slower is None:
        return bool(probe.kernels)
    return slower <= (1.0 if probe.kernels is False else _NO_KERNEL_FACTOR)


def notes(support: DtypeSupport, suite: Suite, dtypes: Sequence[str]) -> Iterator[str]:
    """Yield texts on how the device changes a suite: dtypes that are left out, what "lower" means, the sizes.

    Args:
        support: the result of the probe.
        suite: the suite.
        dtypes: the dtypes that the user has named; empty if none.
    """
    if support.fault is not None:
        reason = support.fault.splitlines()[0]
        lower = support.capabilities.lower
        yield f"the dtypes of {support.device} could not be probed: {reason}. The cases with {lower} run anyway"
        return
    blocks = [block for block in suite.matrix or () if (block.cpu if support.device == "cpu" else block.gpu)]
    if support.lanes is not None and any(len(block.cpu or ()) > 1 for block in blocks):
        yield f"sizes are chosen for a CPU that computes {support.lanes:g} fp32 numbers at once (threads x vector)"
    if dtypes:
        return
    names = {name for block in blocks for name in block.dtype}
    used = names | (set(cases.LOW) if cases.LOWER in names else set())
    for precision in support.precisions:
        if precision.dtype in used and not precision.kernels:
            yield describe_omission(precision, support.device)
        elif precision.dtype in used and precision.fault is not None:
            yield f"{precision.dtype}: its probe failed ({precision.fault}); its cases run anyway"
    if _TF32 in names and _TF32 in support.capabilities.without:
        yield f"{_TF32}: left out, since only NVIDIA GPUs of the Ampere generation or newer have it"
    if cases.LOWER in names:
        lower = support.capabilities.lower
        yield f"lower precision: {lower or 'none; this device has kernels for fp32 only'}"


def describe_omission(precision: Precision, device: str) -> str:
    """Return a text for the user on the reason for which a dtype is left out."""
    kind = "CPU" if device == "cpu" else "card"
    if precision.fault is not None:
        return f"{precision.dtype}: left out, since its probe failed ({precision.fault})"
    slower = (
        f", and it is about {_round(precision.slower)} times slower than fp32" if precision.slower is not None else ""
    )
    return f"{precision.dtype}: left out, since this {kind} has no kernels for it{slower}"


def _round(times: float) -> str:
    return f"{times:.1f}" if times < 10 else f"{round(times, -1 if times >= 20 else 0):.0f}"
