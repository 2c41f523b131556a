"""Define the records of a run: cases, their results, and the run itself, as frozen dataclasses.

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
    """Name how the measurement of a case ended.

    SKIPPED: the case cannot run on this device, or had no time. OOM: out of memory. TIMEOUT: a time limit ended it.
    ERROR: an exception, a dead worker, or wrong numbers in the image.
    """

    OK = "ok"
    SKIPPED = "skipped"
    OOM = "oom"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class Case:
    """Describe one measurement of a suite: a model, a device and all settings.

    `height` and `width`: of the image, in pixels. `steps`: diffusers' `num_inference_steps`; some schedulers evaluate
    the model more than once a step. `batch`: the images that are generated together. `layout`: torch's memory format.
    `task`: the task of the pipeline; "" for the task that the model was trained for. The values of `dtype`,
    `scheduler`, `layout`, `attention`, `compile`, `offload` and `vae` are names of `bench.core.axes`. `threads`: the
    threads of torch; 0 for torch's default.
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
        """Return the name of the case in reports and picture files.

        It contains every setting that is not the default.
        """
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
        """Return the settings as reports show them.

        They are the dtype, "batch N", and every other setting that is not the default.
        """
        return [self.dtype, f"batch {self.batch}", *self.unusual.values()]

    @property
    def is_reference(self) -> bool:
        """Return whether the case can be the reference for the numbers of other cases.

        That is a case in fp32 without a setting that changes the rounding.
        """
        return self.dtype == "fp32" and set(self.unusual) <= {"threads", "seed", "vae"}

    @property
    def unusual(self) -> dict[str, str]:
        """Return {axis: its value as it appears in `name`} for each setting that is not the default."""
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
    """Record the wall seconds of the phases before the samples; None for a phase that was not reached."""

    imports_seconds: float | None = None
    load_seconds: float | None = None
    first_image_seconds: float | None = None


@dataclass(frozen=True)
class Sample:
    """Record one timed image or batch, that is, one whole sampling loop.

    `seconds`: the wall time; the device is synchronized before and after it. `step_seconds`: the times between the ends
    of consecutive evaluations of the model. `cpu_seconds`: the CPU time of the worker, all threads together.
    """

    seconds: float
    step_seconds: tuple[float, ...]
    cpu_seconds: float


@dataclass(frozen=True)
class Memory:
    """Record the peaks of memory in bytes; None for a value that cannot be read.

    `host_load_peak_bytes`, `host_run_peak_bytes`: the peak of the worker's resident memory while the weights are
    loaded, and while the images are made. `host_run_uss_peak_bytes`: the peak of the memory that it shares with no
    other process (USS), read every few milliseconds during an image that is not timed. `device_peak_allocated_bytes`,
    `device_peak_reserved_bytes`: of torch's allocator. `device_used_bytes`: the memory in use on the whole GPU, by all
    processes. `device_process_bytes`: the memory of the worker on the GPU. NVML reports the last two.
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
    """Record the number of floating point operations (FLOPs) of a case, and the speed of the machine.

    FLOPs count a multiply-add as two, as torch.utils.flop_counter does. `probe_flops_per_second`: the rate of a short
    convolution in the case's dtype, from which `predicted_step_seconds` was computed. `peak_flops_per_second`: {kind of
    probe: its best rate}; the probes run before, between and after the images. `evaluations`: the evaluations of the
    model for an image. `copy_bytes_per_second`: the rate of a copy in memory (bytes read and bytes written) each time
    that the probes run; different rates show that the speed of the machine changed. `predicted_compile_seconds`: the
    time that torch.compile takes, predicted from the compilation of one block of the model.
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
    """Record the checks of the images' numbers, and the name of the image file that is kept beside the run's file.

    `finite`: no pixel is NaN or infinite. `image_sha256`: the checksum of the first image in 8 bits. `repeats`: a
    second image with the same seed has the same numbers. `forward_error`: the relative L2 distance between one
    evaluation of the model and the same evaluation in fp32 with the default settings; above `tolerance` the case has
    failed. Where it is None, `not_compared` is the reason. `psnr`: the peak signal-to-noise ratio between the image and
    that of the same case in fp32, in decibels: 10 log10 of 1 over the mean squared difference of pixels in [0, 1]. It
    is 100 for equal images, and None where the run has no such case in fp32.
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
    """Record the host load while the samples were taken; a share is a number from 0 to 1.

    `threads`: the threads of torch. `cpu_share`: the CPU time of the worker over wall time times threads.
    `steal_share`: the part that the hypervisor took away of the CPU time for which the machine had work.
    `pressure_share`: the part of the time in which some task of the machine waited for a core (the kernel's PSI).
    `wait_share`: the time in which the worker's own threads waited for a core, over the time in which they ran or
    waited. `harness_share`: the part of one core that the parent process used. None where the kernel does not report a
    value.
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
    """Record the memory in use at one time.

    `at`: seconds since the worker started. `phase`: the phase of the worker. `host_bytes`: the resident memory of the
    worker. `device_bytes`: the memory in use on the whole GPU. None where a value cannot be read.
    """

    at: float
    phase: str
    host_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True)
class Trust:
    """Record whether other work disturbed a case: `state` is "clean" or "contended" (disturbed), with the reasons."""

    state: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """Record the largest batch and the largest square image that fit, found by bisection; None where none fits.

    `size`: the height and width in pixels. `batch_bound`, `size_bound`: what limits each: "memory", "time", "search"
    (no larger value is tried), or why it was not searched.
    """

    batch: int | None
    batch_bound: str
    size: int | None
    size_bound: str


@dataclass(frozen=True)
class Result:
    """Record the result of one case.

    `reason`: why the status is not ok. `weights`: "real" or "random". `warmups`: the images between the first one and
    the first sample. `shares`: {component: its seconds} within one image that is not a sample; `shares_of_seconds`: the
    seconds of that whole image. `attempts`: how often the case was measured; a disturbed case is measured again.
    `required`: a run in which this case was not measured does not pass. `notes`: how the measurement differs from the
    settings of the case.
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
        """Return the first line of the reason; "" without a reason."""
        return next(iter((self.reason or "").splitlines()), "")


@dataclass(frozen=True)
class Tuning:
    """Record the result of a search for faster settings.

    `default`, `best`: the case with the default settings, and the one with the fastest settings found. `gain`: how many
    times as fast `best` is as `default`; `gain_low` and `gain_high` are its 95 % interval. All three are None where no
    setting is faster. `code`: Python code with the best settings. `doubt`: the reason why the gain is not reliable.
    `notes`: further remarks for the reader.
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
    """Record whether a device has kernels for a dtype, as torch reports and a short convolution in this dtype confirms.

    `flops_per_second`: the rate of the convolution; None where it could not run. `slower`: its time as a multiple of
    the time in fp32. `fault`: what ended the probe (a signal, an exception or a deadline).
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
    `tuning`: the result of `bench tune`; the cases are then the settings that were tried. `validation`: the result of
    `bench validate`; such a run has no cases. `precisions`: the dtypes below fp32 that were probed before the cases.
    `notes`: what was chosen for the device or left out.
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
