"""The records of a benchmark: what is measured, what was found; frozen, standard library alone.

Schema history of a run:
1 - first light.
2 - more axes of a case; warm-up images, shares, the peak and the images before it, numerics against fp32, memory over
    time, the GPU's readings, trust, validations. Every new field has a default: a run of schema 1 is read as it is.
3 - which dtypes the device has kernels for, what was chosen for it, which cases must be measured. All have defaults.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bench.core.validation_records import (
    GpuLoadStats,  # noqa: TC001 (the codec reads a record's types)
    Validation,  # noqa: TC001 (the codec reads a record's types)
    Verdict,  # noqa: TC001 (the codec reads a record's types)
)

SCHEMA = 3


class Status(str, Enum):
    """How a case ended."""

    OK = "ok"
    SKIPPED = "skipped"
    OOM = "oom"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class Case:
    """One cell of a suite: what is computed, and how.

    `height` and `width` are of the image, in pixels; `steps` is what a scheduler is asked for: how often the model is
    evaluated is up to the scheduler. `task` is what a pipeline makes of the model ("" for what it was trained for),
    `attention`, `compile`, `offload` and `vae` are of `bench.axes`. `threads`: 0 for as many as torch takes.
    """

    model: str
    device: str
    dtype: str
    scheduler: str
    steps: int
    batch: int
    height: int
    width: int
    layout: str = "contiguous"
    seed: int = 0
    task: str = ""
    attention: str = "sdpa"
    compile: str = "eager"
    offload: str = "none"
    vae: str = "whole"
    threads: int = 0

    @property
    def name(self) -> str:
        """What the reports call it, and its pictures: every axis that is not as usual is in it."""
        task = f"-{self.task}" if self.task else ""
        parts = [
            f"{self.model}{task}-{self.device.replace(':', '')}-{self.dtype}",
            f"{self.scheduler}{self.steps}",
            f"{self.height}x{self.width}",
            f"b{self.batch}",
            *(value.replace("_", "-") for value in self.unusual.values()),
        ]
        return "-".join(parts)

    @property
    def settings(self) -> list[str]:
        """What of it can be tuned: its dtype, its batch, and whatever is not as usual."""
        return [self.dtype, f"batch {self.batch}", *self.unusual.values()]

    @property
    def is_reference(self) -> bool:
        """Whether its numbers are what others are held against: fp32, and no setting that rounds otherwise."""
        return self.dtype == "fp32" and set(self.unusual) <= {"threads", "seed", "vae"}

    @property
    def unusual(self) -> dict[str, str]:
        """{axis: value, as names have it} of the settings that differ from the library's own."""
        settings = {
            "layout": (self.layout, "contiguous", ""),
            "attention": (self.attention, "sdpa", "attention-"),
            "compile": (self.compile, "eager", ""),
            "offload": (self.offload, "none", "offload-"),
            "vae": (self.vae, "whole", "vae-"),
            "threads": (str(self.threads), "0", "threads-"),
            "seed": (str(self.seed), "0", "seed-"),
        }
        return {axis: prefix + value for axis, (value, usual, prefix) in settings.items() if value != usual}


@dataclass(frozen=True)
class Phases:
    """Wall seconds of what happens once, before the samples; None where it was not reached."""

    imports_seconds: float | None = None
    load_seconds: float | None = None
    first_image_seconds: float | None = None


@dataclass(frozen=True)
class Sample:
    """One whole sampling loop.

    `seconds` is wall time between two synchronisations; `step_seconds` lie between the ends of consecutive
    evaluations of the model; `cpu_seconds` is the process's CPU time, all threads together.
    """

    seconds: float
    step_seconds: tuple[float, ...]
    cpu_seconds: float


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes. Host peaks are of the phase, not of the process's life; None where it cannot be read.

    `host_run_uss_peak_bytes` is memory that no other process shares, read every few milliseconds during an image that
    is not timed. `device_used_bytes` is of the whole card and all who use it, `device_process_bytes` of the process,
    both as NVML tells.
    """

    host_load_peak_bytes: int | None = None
    host_run_peak_bytes: int | None = None
    device_peak_allocated_bytes: int | None = None
    device_peak_reserved_bytes: int | None = None
    host_run_uss_peak_bytes: int | None = None
    device_used_bytes: int | None = None
    device_process_bytes: int | None = None


@dataclass(frozen=True)
class Work:
    """How much arithmetic the case is, and how much the machine does.

    FLOPs count a multiply-add as two, as torch.utils.flop_counter does. `probe_flops_per_second` is the rate
    of a short convolution in the case's dtype, from which the cost was predicted. `peak_flops_per_second` is
    {probe: the best rate that it reached before, between and after the images}. `evaluations` of the model an image.
    `copy_bytes_per_second`: what a copy in memory moved (read and written) at each of these askings: a machine that
    becomes another one shows it there. `predicted_compile_seconds`: from one block that was compiled.
    """

    flops_per_step: int | None = None
    flops_per_image: int | None = None
    probe_flops_per_second: float | None = None
    predicted_step_seconds: float | None = None
    peak_flops_per_second: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluations: int | None = None
    predicted_compile_seconds: float | None = None
    copy_bytes_per_second: tuple[float, ...] = ()


@dataclass(frozen=True)
class Numerics:
    """Whether the pictures are numbers, and right ones; where the kept one lies (beside the run's file).

    `repeats`: the same seed gave the same numbers again. `forward_error`: the relative L2 distance of one evaluation of
    the model from the same in fp32 with the library's own settings, at most `tolerance`; None with `not_compared`.
    `psnr`: decibels of the picture against the same case's in fp32 (10 log10 of 1 over the mean squared difference of
    pixels in [0, 1]), 100 where the two are equal; None where its run has no such case.
    """

    finite: bool
    image: str | None
    image_sha256: str
    repeats: bool | None = None
    forward_error: float | None = None
    tolerance: float | None = None
    not_compared: str | None = None
    psnr: float | None = None


@dataclass(frozen=True)
class Host:
    """What else the machine did while the samples were taken.

    `cpu_share` is the CPU time of the process over wall time times threads; `steal_share` the part of all
    CPU time that the hypervisor took away; `pressure_share` the part of the time in which some task of the machine
    waited for a core (the kernel's PSI); `wait_share` the time that the process's own threads waited for one, over wall
    time times threads. `harness_share` is what the parent used of one core meanwhile.
    """

    threads: int
    cpu_share: float | None
    steal_share: float | None
    load_average: float | None
    pressure_share: float | None = None
    wait_share: float | None = None
    harness_share: float | None = None
    gpu: GpuLoadStats | None = None


@dataclass(frozen=True)
class Moment:
    """One reading of memory: seconds since the worker was started, the phase, bytes of the process and of the card."""

    at: float
    phase: str
    host_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True)
class Trust:
    """Whether a case's figures are its own: `contended` by other work, or `clean`; the reasons."""

    state: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """The largest that fits, by bisection; `bound` says what ended the search: memory, or the time for it."""

    batch: int | None
    batch_bound: str
    size: int | None
    size_bound: str


@dataclass(frozen=True)
class Result:
    """What became of one case; `reason` says why it is not ok.

    `warmups`: images before the loop was steady, after the first. `shares`: {component: its seconds} of one image that
    is not among the samples, which took `shares_of_seconds`. `attempts`: how often it was measured until it was clean.
    `required`: its suite is not done without it.
    """

    case: Case
    status: Status
    reason: str | None = None
    weights: str | None = None
    phases: Phases = Phases()
    samples: tuple[Sample, ...] = ()
    memory: Memory = Memory()
    work: Work = Work()
    numerics: Numerics | None = None
    host: Host | None = None
    software: dict[str, str] = dataclasses.field(default_factory=dict)
    warmups: tuple[Sample, ...] = ()
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    shares_of_seconds: float | None = None
    timeline: tuple[Moment, ...] = ()
    trust: Trust | None = None
    fit: Fit | None = None
    attempts: int = 1
    required: bool = False

    @property
    def cause(self) -> str:
        """The first line of the reason; empty without one."""
        return next(iter((self.reason or "").splitlines()), "")


@dataclass(frozen=True)
class Tuning:
    """What a search has found. `gain`: how many times as fast `best` is as `default`, and its 95 % interval.

    None where nothing is faster. `doubt`: why that is not to be believed; `notes`: what else a reader must know.
    """

    default: Case
    best: Case
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    code: str
    doubt: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Precision:
    """Record whether a device has kernels for a dtype, as torch reports and a short convolution confirms.

    `flops_per_second` is the rate of that convolution, None where it could not be made; `slower`: how many times less
    that is than in fp32. `fault`: what ended the probe (a signal, an exception, a deadline).
    """

    dtype: str
    kernels: bool
    flops_per_second: float | None = None
    slower: float | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Run:
    """One run of a suite on one machine. `started` is UTC, ISO 8601; `seconds` is the whole wall time.

    `command`: what repeats it. `interleaved`: its cases are pairs whose images were made in turns. `tuning`: what a
    search has found, whose tries its cases are. `validation`: of one that has no cases, but a host's health.
    `precisions`: of the low dtypes that were probed before the cases. `notes`: what was chosen for the device, or left
    out, in words.
    """

    schema: int
    id: str
    started: str
    seconds: float
    machine: dict[str, Any]
    suite: str
    results: tuple[Result, ...]
    verdict: Verdict
    command: str | None = None
    interleaved: bool = False
    tuning: Tuning | None = None
    validation: Validation | None = None
    precisions: tuple[Precision, ...] = ()
    notes: tuple[str, ...] = ()
