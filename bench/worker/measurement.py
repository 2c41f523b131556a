"""Measures one case in a worker process, in stages; each stage takes the results of earlier stages as arguments."""

from __future__ import annotations

import math
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.core import axes, stats
from bench.core.errors import BUDGET, PARTNER, SkipError, is_unsupported
from bench.core.result import Memory, Numerics, Phases, Result, Sample, Status, Work
from bench.core.worker_events import CardOpened, PhaseEntered, PhasesTimed, WorkPredicted
from bench.core.worker_requests import GO, CaseRequest
from bench.worker import (
    compile_cost,
    components,
    device_probe,
    device_timers,
    host_load,
    libraries,
    max_size,
    numerics,
    predicted_time,
    sampling,
    timing,
)
from bench.worker import memory as device_memory
from bench.worker.job import Deadlines, Job, PartialResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.core.worker_events import Emit

_SLOW_STEP_SECONDS = 20.0
_LAST_SECONDS = 3.0  # this much time is reserved for the comparison with fp32


def measure(request: CaseRequest, emit: Emit, *, imports_seconds: float = 0.0) -> Result:
    """Measure one case. A failure gives a result with its reason and the data collected before it.

    Args:
        request: the case and its time limits.
        emit: called with each event.
        imports_seconds: the seconds of the imports if `libraries.prepare` has made them already.
    """
    so_far = PartialResult(Result(request.case, Status.ERROR))
    try:
        _run_stages(Job(request, emit, so_far, _deadlines(request)), imports_seconds)
    except SkipError as error:
        so_far.add(status=Status.SKIPPED, reason=str(error))
    except MemoryError:
        so_far.add(status=Status.OOM, reason="the host has no memory left")
    except Exception as error:  # a library may raise anything; the result reports it, and the next case runs
        text = f"{type(error).__name__}: {error}".strip()
        oom = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
        so_far.add(status=Status.OOM if oom else Status.ERROR, reason=text[:2000])
    return so_far.result


def _deadlines(request: CaseRequest) -> Deadlines:
    requested_at = time.perf_counter() - (time.time() - request.asked_at)
    limit = requested_at + request.limit_seconds
    checks = request.checks_seconds
    return Deadlines(requested_at + request.share_seconds, limit if checks is None else requested_at + checks, limit)


@dataclass(frozen=True)
class _Imported:
    """Hold torch, set up for the case, the case's model on the meta device, and the seconds of the imports."""

    torch: Any
    model: components.Model
    imports_seconds: float


@dataclass(frozen=True)
class _PredictedCost:
    """Hold the predicted time of a step; `rate`: the FLOPs a second that the probe measured.

    `least_images`: the fewest images, the first one included, that give a result.
    """

    rate: float
    step_seconds: float
    work: Work
    least_images: int

    @property
    def is_slow(self) -> bool:
        """Return whether optional probes and checks would take too long, since a step takes more than 20 s."""
        return self.step_seconds > _SLOW_STEP_SECONDS


@dataclass(frozen=True)
class _Loaded:
    """Hold the sampling loop with its weights, and the seconds of loading them.

    `peak_bytes`: the peak of the worker's resident memory while loading; None if it cannot be read.
    """

    loop: sampling.Loop
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class _FirstImage:
    """Hold the checks of the first image's numbers, and the checksum of all its bits."""

    numerics: Numerics
    digest: str


@dataclass(frozen=True)
class _Sampled:
    """Hold the samples without warm-up, and the memory peaks while they were taken."""

    samples: tuple[Sample, ...]
    memory: Memory


@dataclass(frozen=True)
class _Meters:
    """Hold what measures while the loop runs: the device's clock, the memory peaks, and the peak rate."""

    clock: device_timers.Clock
    memory: device_memory.Peaks
    peak: device_probe.Peak


def _run_stages(job: Job, imports_seconds: float) -> None:
    imported = _import(job, imports_seconds)
    torch, device = imported.torch, job.case.device
    cost = _predict_cost(job, imported)
    peak = device_probe.Peak(torch, device, job.case.dtype, cost.rate)
    if not cost.is_slow:
        peak.measure()
    loaded = _load(job, imported)
    clock = device_timers.clock_for(torch, device)
    memory = device_memory.Peaks(torch, device)
    first = _make_first_image(job, imported, cost, loaded, clock)
    sampled = _take_samples(job, cost, loaded, first, _Meters(clock, memory, peak))
    _check(job, cost, loaded, first, sampled)


def _import(job: Job, earlier_seconds: float) -> _Imported:
    began = time.perf_counter()
    case = job.case
    job.emit(PhaseEntered("imports"))
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()
    seconds = time.perf_counter() - began + earlier_seconds
    if case.threads:
        torch.set_num_threads(case.threads)
    if case.dtype == "tf32" and not case.device.startswith("cuda"):
        raise SkipError("only NVIDIA GPUs have the format TF32")
    components.set_precision(torch, case.dtype)
    torch.set_grad_enabled(False)
    if case.device.startswith("cuda"):
        job.emit(CardOpened(str(getattr(torch.cuda.get_device_properties(case.device), "uuid", ""))))
    job.so_far.add(phases=Phases(imports_seconds=seconds), software=libraries.software(torch, diffusers, case))
    return _Imported(torch, components.Model(torch, case), seconds)


def _predict_cost(job: Job, imported: _Imported) -> _PredictedCost:
    """Predict the time of the case from its FLOPs and a probe of the device, before the weights are loaded.

    Raises:
        SkipError: the case cannot run on this device, or cannot end in time.
    """
    job.emit(PhaseEntered("probe"))
    case, request, torch, model = job.case, job.request, imported.torch, imported.model
    predicted_time.check_memory(torch, case, model.weight_bytes)
    try:
        rate = device_probe.rate(torch, case.device, case.dtype, request.cpus)
    except (RuntimeError, TypeError) as error:
        if not is_unsupported(error):  # another failure, for example because the GPU's memory is full
            raise
        raise SkipError(f"{case.device} cannot compute in {case.dtype}: {str(error).splitlines()[0]}") from None
    rate = max(rate, request.rate_known or 0.0)
    usable_rate = predicted_time.usable_rate(torch, case, rate, request.rate_fp32)
    flops = model.flops()
    step_seconds = flops.step / usable_rate
    work = Work(
        flops_per_step=flops.step,
        flops_per_image=flops.batch // case.batch,
        probe_flops_per_second=rate,
        predicted_step_seconds=step_seconds,
        evaluations=flops.evaluations,
    )
    job.so_far.add(work=work, weights="real" if request.weights else "random")
    # The first image, and the fewest samples that give a result; for a pair, those of both cases.
    images = 1 + (2 * stats.ENOUGH_SAMPLES if request.paced else stats.MIN_SAMPLES)
    job.emit(WorkPredicted(work))
    shortest = flops.batch / usable_rate * images
    limit = job.deadlines.case
    if time.perf_counter() + shortest > limit:
        raise SkipError(predicted_time.too_long(step_seconds, shortest, limit - time.perf_counter()))
    if axes.COMPILES[case.compile] is not None:
        work = _predict_compilation(job, model, work, shortest)
    return _PredictedCost(rate, step_seconds, work, images)


def _predict_compilation(job: Job, model: components.Model, work: Work, rest: float) -> Work:
    """Return the work with the predicted seconds of the compilation.

    Raises:
        SkipError: these seconds and those of the fewest images (`rest`) do not fit in the time left.
    """
    job.emit(PhaseEntered("probe of the compiler"))
    seconds = compile_cost.predict(model)
    work = replace(work, predicted_compile_seconds=seconds)
    job.so_far.add(work=work)
    job.emit(WorkPredicted(work))
    left = job.deadlines.case - time.perf_counter()
    if seconds + rest > left:
        raise SkipError(
            f"compiling would take about {seconds:.0f} s and the fewest images {rest:.0f} s; "
            f"{BUDGET} {max(left, 0):.0f} s"
        )
    return work


def _load(job: Job, imported: _Imported) -> _Loaded:
    job.emit(PhaseEntered("load"))
    device_memory.reset_host_peak()
    began = time.perf_counter()
    imported.model.load({name: Path(folder) for name, folder in job.request.weights.items()})
    loop = sampling.Loop(imported.model)
    device_timers.synchronize(imported.torch, job.case.device)
    seconds = time.perf_counter() - began
    job.so_far.add(notes=loop.notes)
    return _Loaded(loop, seconds, device_memory.host_peak_bytes() if device_memory.reset_host_peak() else None)


def _make_first_image(
    job: Job, imported: _Imported, cost: _PredictedCost, loaded: _Loaded, clock: device_timers.Clock
) -> _FirstImage:
    job.emit(PhaseEntered("first image"))
    check_time = predicted_time.time_check(
        job.case, cost.work.evaluations or 1, cost.least_images - 1, job.deadlines.case
    )
    clock.start()
    pixels, raw = loaded.loop(predicted_time.call_both(clock.mark, check_time))
    seconds, _ = clock.stop()
    phases = Phases(imported.imports_seconds, loaded.seconds, seconds)
    job.emit(PhasesTimed(phases))
    image_numerics = numerics.check_image(pixels, raw, job.request.image)
    job.so_far.add(phases=phases, numerics=image_numerics)
    return _FirstImage(image_numerics, numerics.digest(raw))


def _take_samples(job: Job, cost: _PredictedCost, loaded: _Loaded, first: _FirstImage, meters: _Meters) -> _Sampled:
    job.emit(PhaseEntered("samples"))
    request, memory, peak, torch = job.request, meters.memory, meters.peak, loaded.loop.model.torch

    def pause() -> None:
        memory.pause()
        if not cost.is_slow:
            job.emit(PhaseEntered("probe"))
            peak.measure()
            job.emit(PhaseEntered("samples"))
        memory.resume()

    load = host_load.HostLoad()
    more = (
        _continue_on_go(loaded.loop.model) if request.paced else timing.until(job.deadlines.samples, job.deadlines.case)
    )
    between = (lambda: None) if request.paced else pause
    images = timing.take(loaded.loop, meters.clock, more, job.emit, between, load.watched)
    if not images.every:
        raise SkipError(PARTNER)
    used = sum(sample.cpu_seconds for sample in images.every)
    host = load.host(torch.get_num_threads(), used, sum(sample.seconds for sample in images.every))
    job.emit(PhaseEntered("probe"))
    memory.pause()
    if not cost.is_slow:
        peak.measure()
    status, reason = _outcome(images, is_finite=first.numerics.finite, is_paced=request.paced)
    sampled = _Sampled(tuple(images.samples), replace(memory.memory(), host_load_peak_bytes=loaded.peak_bytes))
    job.so_far.add(
        status=status,
        reason=reason,
        warmups=tuple(images.warmups),
        samples=sampled.samples,
        memory=sampled.memory,
        # No copy rates of a pair: its images are made in turns, so a change of the machine affects both cases alike.
        work=replace(
            cost.work,
            peak_flops_per_second=peak.best,
            copy_bytes_per_second=() if request.paced else tuple(peak.copies),
        ),
        host=host,
    )
    return sampled


def _outcome(images: timing.TimedImages, *, is_finite: bool, is_paced: bool) -> tuple[Status, str | None]:
    if not is_finite:
        return Status.ERROR, "the image holds NaN or infinity"
    count = len(images.every)
    if not is_paced and count < stats.MIN_SAMPLES:
        seconds = images.every[-1].seconds
        return Status.TIMEOUT, f"an image took {seconds:.3g} s: after {count} images {BUDGET} no time for another"
    return Status.OK, None


def _check(job: Job, cost: _PredictedCost, loaded: _Loaded, first: _FirstImage, sampled: _Sampled) -> None:
    """Generate one more image and measure the time of its components and its memory; then check the numbers.

    The image must have the same bits as the first one. If there is time, the largest batch and image are searched, and
    one evaluation is compared with fp32.
    """
    job.emit(PhaseEntered("checks"))
    loop, until = loaded.loop, job.deadlines.checks
    image_seconds = max(sample.seconds for sample in sampled.samples)
    if time.perf_counter() + image_seconds * 1.5 > until:
        job.so_far.add(numerics=replace(first.numerics, not_compared="the time budget is used up"))
        return
    unet, torch = loop.model.components["unet"], loop.model.torch
    began = time.perf_counter()
    shares = timing.PhaseTimer(torch, job.case.device, loop.parts)
    with device_memory.UssPeak() as uss, numerics.first_evaluation(unet) as kept, shares:
        _, raw = loop(lambda: None)
        device_timers.synchronize(torch, job.case.device)
    job.so_far.add(
        shares=shares.seconds(),
        shares_of_seconds=time.perf_counter() - began,
        memory=replace(sampled.memory, host_run_uss_peak_bytes=uss.bytes),
    )
    checked = replace(first.numerics, repeats=numerics.digest(raw) == first.digest)
    del raw
    if job.request.find_max:
        job.emit(PhaseEntered("largest"))
        job.so_far.add(fit=max_size.largest(loop.model, until - _LAST_SECONDS))
    job.so_far.add(numerics=_compared(job, cost, sampled, checked, lambda: numerics.forward_error(loop.model, kept[0])))


def _compared(
    job: Job, cost: _PredictedCost, sampled: _Sampled, checked: Numerics, forward_error: Callable[[], float]
) -> Numerics:
    """Return the numerics with the error of one evaluation against fp32, or with the reason for which it is missing.

    An error above the tolerance sets the status of the case to ERROR.
    """
    why_not = _why_not_compared(job, cost, sampled)
    if why_not is not None:
        return replace(checked, not_compared=why_not)
    try:
        error = forward_error()
    except (MemoryError, RuntimeError) as exception:  # torch.OutOfMemoryError is a RuntimeError
        return replace(checked, not_compared=str(exception).splitlines()[0][:200])
    limit = axes.TOLERANCES[job.case.dtype]
    if not error <= limit:  # also true for NaN
        reason = f"one evaluation differs from fp32 by {error:.2g} (relative L2 distance); the limit is {limit:.2g}"
        job.so_far.add(status=Status.ERROR, reason=reason)
    if not math.isfinite(error):
        return replace(checked, not_compared=f"the difference from fp32 is {error}", tolerance=limit)
    return replace(checked, forward_error=error, tolerance=limit)


def _why_not_compared(job: Job, cost: _PredictedCost, sampled: _Sampled) -> str | None:
    """Return the reason for which no evaluation is compared with fp32; None if one is compared."""
    if not job.request.compare:
        return "an earlier case with the same evaluation was compared with fp32"
    if job.case.is_reference:
        return "the case is itself the reference in fp32"
    if job.case.offload != "none":
        return "the weights are offloaded during the evaluation"
    steps = [step for sample in sampled.samples for step in sample.step_seconds]
    if cost.is_slow or time.perf_counter() + 4 * max([cost.step_seconds, *steps]) > job.deadlines.checks:
        return "the time budget is used up"
    return None


def _continue_on_go(model: components.Model) -> Callable[[timing.TimedImages], bool]:
    """Return a condition that waits for a line on stdin and is true if the line is "go": one image per line.

    Before each image some weights are reallocated, so that their placement in memory favours neither case of a pair.
    """
    generator = random.Random(model.case.seed)  # noqa: S311 (not for secrets)

    def more(images: timing.TimedImages) -> bool:
        if sys.stdin.readline().strip() != GO:
            return False
        model.reallocate_weights(generator, images.every[-1].seconds / 4 if images.every else _LAST_SECONDS)
        return True

    return more
