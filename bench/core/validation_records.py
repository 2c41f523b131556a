"""Define the records of a validation (a run of `bench validate`): facts and load of devices, and readings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bench.core.verdict import Judgement  # noqa: TC001 (the codec reads a record's types)

PROCESS = "process"  # the name of the reading that records how the process of an examination ended
# Marks among the figures of a reading; a mark that is set has the value 1.0.
CUT = "cut"  # larger shapes did not fit in the time or the memory, so the value is a lower bound
UNABLE = "unable"  # the device has no such kernel or dtype, so a rule does not report the missing value


@dataclass(frozen=True)
class GpuLoadStats:
    """Record the GPU's state over the phase that was monitored; None for a value that the driver does not report.

    `throttled`: {reason: the share of the polls in which it lowered the clocks}. `reasons_told`: whether the driver
    reports such reasons at all; an empty `throttled` means no throttling only if it does (None in older files).
    `others`: the number of other processes on the GPU. `energy_source`: "counter" (the GPU's energy counter) or "power"
    (its power, integrated over time).
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
    """Record what the driver reports about a device; None for a fact that the driver does not report.

    Of a CPU only `device` and `name` are set. `driver_sees`: whether NVML lists the device (a container may hide it).
    `slice`: the device is a part of a GPU (MIG, vGPU). `ecc`: ECC is on. `ecc_corrected`, `ecc_uncorrected`: the memory
    errors since the driver was loaded. `pages_retired`: the memory pages or rows that the GPU has replaced.
    `rows_pending`: the GPU will replace more at the next reset. `rows_failed`: a replacement failed. `xids`: the
    driver's numbers of hardware errors (XIDs) that occurred during the validation. `persistence`: the driver's
    persistence mode is on. `pcie_generation`, `pcie_width`: of the PCIe link under load; `pcie_generation_most`,
    `pcie_width_most`: the maximum that GPU and slot allow. `others`: the number of processes on the device that are not
    firstlight's.
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

    `probe`: the phase of the examination. `name`: the measured quantity, such as "product bf16". `value`: the best of
    `samples`; None where there is none, with the reason in `why_not` or `fault`. `unit`: of `value` and `samples`:
    "FLOP/s", "B/s", "s" (seconds per step), or "" for a share or a relative error. `limit`: the largest acceptable
    relative error; None for other quantities. `fault`: an error that proves a defect, such as a NaN or a changed byte.
    `figures`: {name: further number of the reading}. `round`: the number of the repetition in a soak; 0 before the
    soak.
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
    """Record the result of a host's validation.

    `cards`: the facts of its devices afterwards; `before`: the same before the examination. `seconds`: {phase: the
    seconds on the device that took longest}. `watched`: {device: its state under sustained load}. `disturbed`: {device:
    the other work that disturbed its examination}. `software`: {name: version}. `soak_seconds`: the length of the soak;
    None without a soak.
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
