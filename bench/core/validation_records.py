"""Define the records of a validation: facts and load of GPUs, and readings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bench.core.verdict import Judgement  # noqa: TC001 (the codec reads a record's types)

PROCESS = "process"  # the name of the reading that records how an examining process ended
# Marks among the figures of a reading; a mark that is set has the value 1.0.
CUT = "cut"  # larger shapes did not fit in time or memory, so the value is a lower bound
UNABLE = "unable"  # the device has no such kernel or dtype, so a missing value is no gap


@dataclass(frozen=True)
class GpuLoadStats:
    """Record the GPU's readings while the samples were taken; None where the driver does not report a value.

    `throttled`: {reason: its share of the readings}. `reasons_told`: whether the driver reports reasons at all, which
    tells an empty `throttled` from an unknown one (None in older files). `others`: the number of other processes on the
    GPU. `energy_source`: "counter" (the GPU's own) or "power" (its power, integrated over time).
    """

    clock_mhz_median: float | None = None
    clock_mhz_minimum: float | None = None
    temperature_maximum: float | None = None
    power_watts_mean: float | None = None
    power_limit_watts: float | None = None
    throttled: dict[str, float] = dataclasses.field(default_factory=dict)
    reasons_told: bool | None = None
    others: int | None = None
    energy_joules: float | None = None
    energy_source: str | None = None


@dataclass(frozen=True)
class DeviceFacts:
    """Record what the driver reports about a device; None for a fact that it does not report. A CPU has only a name.

    `driver_sees`: whether NVML finds the device (a container may hide it). `slice`: the device is a part of a GPU (MIG,
    vGPU). `ecc_corrected`, `ecc_uncorrected`: memory errors since the driver was loaded. `pages_retired`: memory pages
    or rows that were replaced. `rows_pending`: more will be replaced at the next reset. `rows_failed`: a replacement
    failed. `xids`: the driver's numbers of the hardware errors that came during the watch. `pcie_generation`,
    `pcie_width`: the link under load; those with `_most`: the maximum of GPU and slot. `others`: the number of
    processes on the device that are not firstlight's.
    """

    device: str
    name: str
    uuid: str | None = None
    driver: str | None = None
    driver_sees: bool = False
    compute_capability: str | None = None
    memory_bytes: int | None = None
    slice: bool | None = None
    ecc: bool | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    pages_retired: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    xids: tuple[int, ...] = ()
    persistence: bool | None = None
    power_limit_watts: float | None = None
    power_default_watts: float | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    pcie_generation_most: int | None = None
    pcie_width_most: int | None = None
    others: int | None = None


@dataclass(frozen=True)
class Reading:
    """Record the value that one phase of an examination measured on one device.

    `probe`: the phase of the examination. `name`: the measured quantity. `value`: the best of the raw `samples`; None
    where there is none, with the reason in `why_not` or `fault`. `unit`: of `value` and `samples`: "FLOP/s", "B/s", "s"
    (seconds per step), or "" for a share or a relative error. `limit`: the largest acceptable relative error. `fault`:
    an error that is wrong in itself, such as a NaN or a changed byte. `figures`: further numbers of the reading.
    `round`: the round of a soak.
    """

    probe: str
    name: str
    device: str
    unit: str
    value: float | None
    samples: tuple[float, ...] = ()
    limit: float | None = None
    why_not: str | None = None
    fault: str | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    round: int = 0


@dataclass(frozen=True)
class Validation:
    """Record the results of a host's examination: its devices before and after, all readings, all judgements.

    `seconds`: {phase: the seconds of the slowest device}. `watched`: {device: its load readings under sustained load}.
    `disturbed`: {device: the other work that disturbed it}. `software`: {name: version}. `soak_seconds`: the length of
    the soak, None without one.
    """

    cards: tuple[DeviceFacts, ...]
    before: tuple[DeviceFacts, ...]
    readings: tuple[Reading, ...]
    judgements: tuple[Judgement, ...]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    watched: dict[str, GpuLoadStats] = dataclasses.field(default_factory=dict)
    disturbed: dict[str, str] = dataclasses.field(default_factory=dict)
    software: dict[str, str] = dataclasses.field(default_factory=dict)
    soak_seconds: float | None = None
