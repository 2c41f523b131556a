"""Decides whether other work on the host or the GPU disturbed a measurement, from the load measured beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.core import stats
from bench.core.result import Trust
from bench.gpu.nvml import FAULT_REASONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.core.result import Host, Result
    from bench.core.validation_records import GpuLoadStats

CLEAN, CONTENDED = "clean", "contended"
# An undisturbed case on 2 threads waits 0.4 % of the time for a core and uses 98 % of both cores. With another busy
# process it waits 30 % and more, and uses 38 to 70 % (measured on a shared 2-core host).
_CLEAN_WAIT_SHARE = 0.05
_CLEAN_CPU_SHARE = 0.85
_CLEAN_PRESSURE_SHARE = 0.25
_CLEAN_STEAL_SHARE = 0.05
_CLEAN_THROTTLED_SHARE = 0.1
# The copy rate varies by a tenth from one measurement to the next. On a shared 2-core virtual machine it changed from
# 50 to 32 GB/s for minutes, and the time of a UNet from 0.64 to 0.53 s. Most likely the hypervisor had moved the
# virtual cores to other physical ones, which a virtual machine cannot see.
_SAME_MACHINE_FACTOR = 1.25
_STEADY_SHARE = 0.05  # the first and the last third of the images of an undisturbed case differ by less than this


def trust(result: Result) -> Trust | None:
    """Return whether other work disturbed a case, with the reasons; None if the case has no samples."""
    if result.host is None or not result.samples:
        return None
    reasons = tuple(_disturbances(result, result.host))
    return Trust(CONTENDED if reasons else CLEAN, reasons)


def same_machine(one: Result, two: Result) -> bool:
    """Return whether two cases were both undisturbed and measured at the same copy rate.

    Another copy rate shows that the speed of the machine has changed.
    """
    copies = [max(result.work.copy_bytes_per_second, default=1.0) for result in (one, two)]
    alike = max(copies) <= _SAME_MACHINE_FACTOR * min(copies) or min(copies) == 1.0
    return alike and of_case(one) is None and of_case(two) is None


def of_case(result: Result) -> str | None:
    """Return how other work disturbed a case, as one text; None if it did not."""
    judged = result.trust or trust(result)
    return ", ".join(judged.reasons) if judged is not None and judged.state == CONTENDED else None


def of_host(host: Host, device: str) -> str | None:
    """Return what other processes of the host did while a device was measured, as one text.

    None if they did nothing.
    """
    return ", ".join(_host_disturbances(host, device)) or None


def _disturbances(result: Result, host: Host) -> Iterator[str]:
    yield from _host_disturbances(host, result.case.device)
    copies = result.work.copy_bytes_per_second
    is_changed = bool(copies) and max(copies) > _SAME_MACHINE_FACTOR * min(copies)
    # A change of the copy rate matters only if the images became faster or slower too.
    if is_changed and stats.level_shift(result.samples) > _STEADY_SHARE:
        first, last = (f"{rate / 1e9:.0f}" for rate in (copies[0], copies[-1]))
        yield f"the speed of the machine changed: its copy rate went from {first} to {last} GB/s"
    if host.gpu is not None:
        yield from _gpu_disturbances(host.gpu)


def _host_disturbances(host: Host, device: str) -> Iterator[str]:
    if host.steal_share is not None and host.steal_share > _CLEAN_STEAL_SHARE:
        yield f"the hypervisor took {host.steal_share:.0%} of the CPU time"
    if host.wait_share is not None:
        if host.wait_share > _CLEAN_WAIT_SHARE:
            yield f"its threads waited {host.wait_share:.0%} of the time for a core"
    elif device == "cpu" and host.cpu_share is not None and host.cpu_share < _CLEAN_CPU_SHARE:
        yield f"it used only {host.cpu_share:.0%} of the time of its {host.threads} threads"
    elif host.pressure_share is not None and host.pressure_share > _CLEAN_PRESSURE_SHARE:
        yield f"some process waited {host.pressure_share:.0%} of the time for a core"


def _gpu_disturbances(gpu: GpuLoadStats) -> Iterator[str]:
    if gpu.others:
        yield f"{gpu.others} other process{'es' if gpu.others > 1 else ''} used the card"
    for name, share in gpu.throttled.items():
        if name in FAULT_REASONS and share > _CLEAN_THROTTLED_SHARE:
            yield f"the card was throttled {share:.0%} of the time ({name})"
