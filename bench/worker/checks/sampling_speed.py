"""Measure the seconds per step of sampling loops, at batch 1 and 4, with random weights."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.core.errors import SkipError
from bench.core.result import Case
from bench.core.validation_records import Reading
from bench.worker import components, device_probe, device_timers, numerics, sampling
from bench.worker.checks import device as checked_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.worker.checks.device import Device

BATCHES = (1, 4)
_WARM, _FEWEST = 1, 3  # the number of warm-up steps, and the least number of steps after them
_MAX_STEPS_CPU, _MAX_STEPS_CARD = 8, 20
# The time to import diffusers and to build a first UNet without its weights, on a shared 2-core host.
_BUILD_SECONDS = 5.0
_CAUTION = 1.5  # a step needs the memory of the weights times this
_REACH = 0.5  # the rate of a whole UNet over that of a fast convolution (0.4 to 0.7 on a 2-core host)


@dataclass(frozen=True)
class Kind:
    """Describe a model to sample from; the scheduler and the image size are those of the suites."""

    model: str
    dtype: str
    scheduler: str
    size: int

    def case(self, device: str, batch: int, steps: int) -> Case:
        """Return a case of this model with this batch and number of steps."""
        return Case(self.model, device, self.dtype, self.scheduler, steps, batch, self.size, self.size)


ON_A_CPU = (Kind("ddpm-cat-256", "fp32", "ddim", 64), Kind("stable-diffusion-v1-5", "bf16", "dpmpp-karras", 128))
ON_A_CARD = (Kind("ddpm-cat-256", "fp16", "ddim", 256), Kind("stable-diffusion-v1-5", "fp16", "dpmpp-karras", 512))


def loop(
    device: Device, until: float, kinds: Sequence[Kind] = (), known: Mapping[str, float] | None = None
) -> Iterator[Reading]:
    """Yield the seconds per step of each sampling loop, one for each model and batch; skip those without enough time.

    Args:
        device: the device.
        until: the time (time.perf_counter) by which all loops have to end.
        kinds: the models to sample from; empty: the default models for a CPU or a GPU.
        known: {dtype: the FLOPs a second that the phase "convolution" measured}. If the probe here measures less, other
            processes have slowed it down, and this rate predicts the time of a step instead.
    """
    kinds = kinds or (ON_A_CARD if device.is_card else ON_A_CPU)
    total = len(kinds) * len(BATCHES)
    is_imported = False
    for number, kind in enumerate(kinds):
        images = _LazyModel(device, kind, (known or {}).get(kind.dtype, 0.0))
        for turn, batch in enumerate(BATCHES):
            name = f"loop {kind.model} {kind.dtype} batch {batch}"
            blank = Reading("loop", name, device.name, "s", None)
            left = total - number * len(BATCHES) - turn
            yield checked_device.reading_or_error(
                blank, partial(_timed_loop, images, batch, _Time(until, left, is_imported), blank)
            )
            is_imported = is_imported or images.is_built
        del images
        gc.collect()
        device.empty_cache()


@dataclass(frozen=True)
class _Time:
    """Hold the deadline of the loops that are left.

    `until`: a time of time.perf_counter. `loops`: the number of loops. `is_ready`: diffusers has been imported.
    """

    until: float
    loops: int
    is_ready: bool

    @property
    def left(self) -> float:
        """Return the seconds left for all loops."""
        return self.until - time.perf_counter()

    @property
    def share(self) -> float:
        """Return the seconds for the next loop: half of an equal share, since later loops take longer."""
        return self.left / self.loops / 2


class _SampledModel:
    """Keep one model on a device, and predict the time of its steps.

    Its weights are made when they are first needed.
    """

    def __init__(self, device: Device, kind: Kind, model: components.Model, rate: float) -> None:
        """Count the FLOPs of a model without weights.

        `rate`: the FLOPs a second from which the first step is predicted.
        """
        self.device, self.kind = device, kind
        self._model, self._rate, self._is_loaded = model, rate, False
        flops = model.flops()
        self._step, self._rest = flops.step, flops.batch - flops.step * flops.evaluations

    def seconds(self, batch: int, steps: int) -> float:
        """Return the predicted seconds of an image with this batch and number of steps."""
        return batch * (self._step * steps + self._rest) / self._rate

    def step_seconds(self, batch: int) -> float:
        """Return the predicted seconds of a step with this batch."""
        return batch * self._step / self._rate

    def flops(self, batch: int) -> float:
        """Return the FLOPs of a step with this batch."""
        return float(batch * self._step)

    def set_rate(self, batch: int, seconds: float) -> None:
        """Replace the rate of the predictions by that of a step that took this many seconds."""
        self._rate = self.flops(batch) / seconds

    def variant(self, batch: int, steps: int) -> components.Model:
        """Return the model with its weights, set to this batch and number of steps."""
        if not self._is_loaded:
            self._load()
        variant = copy.copy(self._model)
        variant.case = self.kind.case(self.device.name, batch, steps)
        return variant

    def _load(self) -> None:
        model = self._model
        parts = [weight for component in model.components.values() for weight in component.parameters()]
        size = sum(weight.numel() for weight in parts) * model.dtype.itemsize
        free = self.device.free_bytes()
        if free is not None and size * _CAUTION > free:
            raise SkipError(f"the weights take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free")
        model.load({})
        self._is_loaded = True


class _LazyModel:
    """Build the model of one kind when a loop first has time for it."""

    def __init__(self, device: Device, kind: Kind, earlier_rate: float) -> None:
        """Build nothing yet.

        `earlier_rate`: the FLOPs a second of the phase "convolution" in this dtype; 0.0 if unknown.
        """
        self._device, self._kind, self._earlier_rate = device, kind, earlier_rate
        self._images: _SampledModel | None = None

    @property
    def is_built(self) -> bool:
        """Return whether the model has been built."""
        return self._images is not None

    def get(self, time_: _Time) -> _SampledModel:
        """Return the model; the first call builds it on the meta device and probes the rate of the device.

        Raises:
            SkipError: there is no time to build the model.
        """
        if self._images is None:
            self._images = _build(self._device, self._kind, self._earlier_rate, time_)
        return self._images


def _build(device: Device, kind: Kind, earlier_rate: float, time_: _Time) -> _SampledModel:
    if not time_.is_ready and time_.left < _BUILD_SECONDS:
        raise SkipError(
            f"building the model takes {_BUILD_SECONDS:.0f} s, and only {max(time_.left, 0):.1f} s are left"
        )
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    torch = device.torch
    components.set_precision(torch, kind.dtype)
    model = components.Model(torch, kind.case(device.name, 1, _WARM + _FEWEST))
    rate = _REACH * max(earlier_rate, device_probe.rate(torch, device.name, kind.dtype))
    return _SampledModel(device, kind, model, rate)


def _timed_loop(lazy: _LazyModel, batch: int, time_: _Time, blank: Reading) -> Reading:
    images = lazy.get(time_)
    count = _WARM + (_MAX_STEPS_CARD if images.device.is_card else _MAX_STEPS_CPU)
    # Twice the predicted time has to fit: a probe may be wrong by that much, and an aborted loop gives no reading.
    while count > _WARM + _FEWEST and 2 * images.seconds(batch, count) > time_.share:
        count -= 1
    predicted_seconds = images.seconds(batch, count)
    if predicted_seconds > time_.left:
        raise SkipError(_too_long(images.step_seconds(batch), predicted_seconds, time_.left))
    variant = images.variant(batch, count)
    durations, finite = _image(images, variant, time_)
    steps = durations[_WARM:]
    median = statistics.median(steps)
    images.set_rate(batch, median)
    return replace(
        blank,
        value=median if finite else None,
        samples=steps,
        figures={"flops_per_second": images.flops(batch) / median, "steps": float(len(steps))},
        fault=None if finite else "the image contains NaN or infinity",
    )


def _image(images: _SampledModel, variant: components.Model, time_: _Time) -> tuple[tuple[float, ...], bool]:
    """Make one image; return the seconds of each of its steps, and whether all its numbers are finite."""
    images.device.wait()
    components.set_precision(variant.torch, variant.case.dtype)
    clock = device_timers.clock_for(variant.torch, images.device.name)
    make = sampling.Loop(variant)
    clock.start()
    pixels, raw = make(_call_both(clock.mark, _time_check(images, variant.case, time_)))
    _, seconds = clock.stop()
    return seconds, numerics.check_image(pixels, raw, None).finite


def _time_check(images: _SampledModel, case: Case, time_: _Time) -> Callable[[], None]:
    """Return a function to call at the begin of an image and after each step; after the second step it checks the time.

    On a CPU it raises SkipError if the image cannot end in time by the seconds of that step. The first prediction is
    from a probe and may be far from the truth.
    """
    marks: list[float] = []

    def check() -> None:
        marks.append(time.perf_counter())
        if len(marks) != 3 or images.device.is_card:
            return
        images.set_rate(case.batch, marks[2] - marks[1])
        predicted_seconds = images.seconds(case.batch, case.steps - 2)
        if predicted_seconds > time_.left:
            raise SkipError(_too_long(marks[2] - marks[1], predicted_seconds, time_.left))

    return check


def _call_both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def _too_long(step: float, whole: float, left: float) -> str:
    return f"a step takes about {step:.2g} s, the shortest loop {whole:.1f} s, and {max(left, 0.0):.1f} s are left"
