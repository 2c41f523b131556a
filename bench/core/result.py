"""Define the records of a run: cases and their results; frozen dataclasses that need only the standard library.

Schema history of a run:
1 - the first version.
2 - added: further axes of a case, warm-up images, the time of each component of an image (`shares`), the peak rate of
the device, numerics compared with fp32, memory over time, GPU readings, whether other work disturbed a case (`trust`),
validations. Every new field has a default, so a run of schema 1 is read as it is.
3 - added: which dtypes the device has kernels for (`precisions`), notes on what was chosen for the device or left out
(`notes`), which cases are required (`required`), how a case differs from its settings (`notes` of a result). All have
defaults.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bench.core.validation_records import (
    GpuLoadStats,  # noqa: TC001 (the codec reads a record's types)
    Validation,  # noqa: TC001 (the codec reads a record's types)
)
from bench.core.verdict import Verdict  # noqa: TC001 (the codec reads a record's types)

SCHEMA = 3


class Status(str, Enum):
    """Name how the measurement of a case ended."""

    OK = "ok"
    SKIPPED = "skipped"
    OOM = "oom"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class Case:
    """Describe one measurement of a suite: a model, a device and all settings.

    `height` and `width`: of the image, in pixels. `steps`: the number that the scheduler is set to; the scheduler
    decides how often it evaluates the model for them. `task`: the task of the pipeline, "" for the one that the model
    was trained for. `attention`, `compile`, `offload` and `vae`: names of `bench.core.axes`. `threads`: 0 for torch's
    default.
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
        """Return the name in reports and picture files; every setting that is not the default is part of it."""
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
        """Return the settings that can be tuned: the dtype, the batch, and every setting that is not the default."""
        return [self.dtype, f"batch {self.batch}", *self.unusual.values()]

    @property
    def is_reference(self) -> bool:
        """Return whether other cases are compared with this one: fp32, and no setting that changes rounding."""
        return self.dtype == "fp32" and set(self.unusual) <= {"threads", "seed", "vae"}

    @property
    def unusual(self) -> dict[str, str]:
        """Return {axis: the value as it appears in names} of the settings that differ from the default."""
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
    """Record the wall seconds of the phases before the samples; None where a phase was not reached."""

    imports_seconds: float | None = None
    load_seconds: float | None = None
    first_image_seconds: float | None = None


@dataclass(frozen=True)
class Sample:
    """Record one timed image or batch: one whole sampling loop.

    `seconds`: wall time between two synchronizations. `step_seconds`: the times between the ends of consecutive
    evaluations of the model. `cpu_seconds`: CPU time of the process, all threads together.
    """

    seconds: float
    step_seconds: tuple[float, ...]
    cpu_seconds: float


@dataclass(frozen=True)
class Memory:
    """Record the peaks of memory in bytes; None where a value cannot be read.

    Host peaks are of the phase, not of the whole life of the process. `host_run_uss_peak_bytes`: memory that no other
    process shares, read every few milliseconds during an image that is not timed. `device_used_bytes`: the memory in
    use on the whole GPU, by all processes. `device_process_bytes`: the memory of this process on the GPU. NVML reports
    both.
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
    """Record the amount of arithmetic of a case, and the rates of the machine.

    FLOPs count a multiply-add as two, as torch.utils.flop_counter does. `probe_flops_per_second`: the rate of a short
    convolution in the case's dtype, from which the cost was predicted. `peak_flops_per_second`: {probe: the best rate
    before, between and after the images}. `evaluations`: evaluations of the model per image. `copy_bytes_per_second`:
    the rate of a copy in memory (read and written bytes) at each of these times; it shows a machine whose speed
    changed. `predicted_compile_seconds`: predicted from one compiled block.
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
    """Record whether the pictures are finite and right, and the name of the kept picture (beside the run's file).

    `repeats`: the same seed gave the same numbers again. `forward_error`: the relative L2 distance of one evaluation of
    the model from the same in fp32 with the default settings, at most `tolerance`; None with `not_compared` as the
    reason. `psnr`: decibels between the picture and that of the same case in fp32 (10 log10 of 1 over the mean squared
    difference of pixels in [0, 1]), 100 where the two are equal; None where the run has no such case.
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
    """Record the host load while the samples were taken; shares are from 0 to 1.

    `cpu_share`: CPU time of the process over wall time times threads. `steal_share`: the part of the CPU time that all
    work of the machine wanted which the hypervisor took away. `pressure_share`: the part of the time in which some task
    of the machine waited for a core (the kernel's PSI). `wait_share`: the part of their runnable time in which the
    process's own threads waited for a core. `harness_share`: the part of one core that the parent process used
    meanwhile.
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
    """Record memory at one time: seconds since the worker started, the phase, bytes of the process and of the GPU."""

    at: float
    phase: str
    host_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True)
class Trust:
    """Record whether other work disturbed a case (`contended`) or not (`clean`), and the reasons."""

    state: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """Record the largest batch and image that fit, found by bisection; a `bound` is what ended it: memory or time."""

    batch: int | None
    batch_bound: str
    size: int | None
    size_bound: str


@dataclass(frozen=True)
class Result:
    """Record the result of one case; `reason` explains a status that is not ok.

    `warmups`: the images after the first one that were made before the loop was steady. `shares`: {component: its
    seconds} of one image that is not a sample and took `shares_of_seconds`. `attempts`: how often the case was measured
    until it was clean. `required`: the suite fails without this case. `notes`: how the case differs from its settings.
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
    notes: tuple[str, ...] = ()

    @property
    def cause(self) -> str:
        """Return the first line of the reason; empty without one."""
        return next(iter((self.reason or "").splitlines()), "")


@dataclass(frozen=True)
class Tuning:
    """Record the result of a search for faster settings.

    `gain`: how many times as fast `best` is as `default`, with its 95 % interval; None where no setting is faster.
    `doubt`: the reason why the gain is not reliable. `notes`: further remarks for the reader.
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

    `flops_per_second`: the rate of that convolution, None where it could not run. `slower`: how many times as slow that
    is as fp32. `fault`: what ended the probe (a signal, an exception, a deadline).
    """

    dtype: str
    kernels: bool
    flops_per_second: float | None = None
    slower: float | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Run:
    """Record one run of a suite on one machine. `started` is in UTC, ISO 8601; `seconds` is the whole wall time.

    `command`: the command that repeats the run. `interleaved`: the cases are pairs whose images were made in turns.
    `tuning`: the result of a search whose trials are the cases. `validation`: the examination of a host, in a run
    without cases. `precisions`: the lower dtypes that were probed before the cases. `notes`: what was chosen for the
    device or left out.
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
