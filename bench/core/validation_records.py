"""The records of a verdict: what a card was seen doing, what was asked of a device, and what the rules make of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

PROCESS = "process"  # the name of the reading that says how the process ended that asked a device
# Marks among the figures of a reading (1.0 where one is there).
CUT = "cut"  # its larger shapes had no time or no room: its value is a lower bound
UNABLE = "unable"  # there is no such kernel or dtype on this device: what has no value then is no gap


class VerdictState(str, Enum):
    """What a whole run says."""

    PASS = "pass"  # noqa: S105 (a verdict)
    WARN = "warn"
    FAIL = "fail"
    NOT_JUDGED = "could not judge"


@dataclass(frozen=True)
class Verdict:
    """The run in one word, and each reason for it."""

    state: VerdictState
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class GpuLoadStats:
    """What the card said while the samples were taken; None where it does not say.

    `throttled`: {reason: share of the readings}; where it names none, `reasons_told` says whether it names any at all
    (None in files of before that was kept). `others`: processes on the card besides the worker.
    `energy_source`: "counter" (the card's own) or "power" (its power, integrated).
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
    """What a device is, as its driver tells; None where that does not say. A CPU is one too, with a name alone.

    `driver_sees`: whether the driver's library answers for it (a container may hide it). `slice`: it is a part of a
    card (MIG). `ecc_corrected` and `ecc_uncorrected`: memory errors since the driver was loaded, `pages_retired`,
    `rows_pending` and `rows_failed`: memory that was given up, that will be at the next reset, or that should have been
    and could not. `xids`: hardware errors (the driver's numbers) that came while it was watched. `pcie_generation` and
    `pcie_width` as they are under load, beside the most that card and slot can. `others`: processes on it that are not
    ours.
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
    """What one question to a device has found.

    `probe` is the phase in which it was asked, `name` what exactly. `value` is the best of the raw `samples` (None
    where there is none: then `why_not`, or `fault`), `unit` that of both: "FLOP/s", "B/s", "s" (seconds a step), or
    "" for a share or a relative error. `limit`: what a relative error may be. `fault`: what is wrong by itself, such
    as a NaN or a byte that did not come back. `figures`: what else belongs to it. `round`: of a soak.
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
class Judgement:
    """What one rule makes of a device.

    `said` names the figure, what was expected and whose that is; `advice` what to do. `source`: where the expected
    figure is from; `confidence`: "own" (this very card's best kept run), "measured", "sheet", or "unchecked".
    """

    rule: str
    device: str
    state: VerdictState
    said: str
    advice: str = ""
    value: float | None = None
    expected: float | None = None
    unit: str = ""
    source: str | None = None
    confidence: str | None = None


@dataclass(frozen=True)
class Validation:
    """A host that was validated: its cards before and after, all readings, all judgements.

    `seconds`: {phase: of the device that took longest in it}. `watched`: {device: what it did under sustained load}.
    `disturbed`: {device: why its figures are not its own}. `software`: {name: version}. `soak_seconds`: how long it was
    repeated, None where it was not.
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
