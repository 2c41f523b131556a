"""Measure the seconds per step of the sampling loops, at batch 1 and 4, with random weights."""

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
from bench.worker import clocks, components, device_probe, numerics, sampling
from bench.worker.checks import device as checked_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.worker.checks.device import Device

BATCHES = (1, 4)
_WARM, _FEWEST = 1, 3  # steps: those of the warm-up, and the least number that counts
_MAX_STEPS_CPU, _MAX_STEPS_CARD = 8, 20
# The time to import diffusers and to build a first UNet without its weights, on a shared 2-core host.
_BUILD_SECONDS = 5.0
_CAUTION = 1.5  # times the weights: the memory that a step needs in all
_REACH = 0.5  # the rate of a whole UNet over that of a good convolution (0.4 to 0.7 on a 2-core host)


@dataclass(frozen=True)
class Kind:
    """Describe a model to sample from; the shapes are those of the suites."""

    model: str
    dtype: str
    scheduler: str
    size: int

    def case(self, device: str, batch: int, steps: int) -> Case:
        """Return the case of this model with a batch and a number of steps."""
        return Case(self.model, device, self.dtype, self.scheduler, steps, batch, self.size, self.size)


ON_A_CPU = (Kind("ddpm-cat-256", "fp32", "ddim", 64), Kind("stable-diffusion-v1-5", "bf16", "dpmpp-karras", 128))
ON_A_CARD = (Kind("ddpm-cat-256", "fp16", "ddim", 256), Kind("stable-diffusion-v1-5", "fp16", "dpmpp-karras", 512))


def loop(
    device: Device, until: float, kinds: Sequence[Kind] = (), known: Mapping[str, float] | None = None
) -> Iterator[Reading]:
    """Yield the seconds per step of each sampling loop (one per model and batch size); skip those without enough time.

    Args:
        device: the device.
        until: the deadline of all loops, on the clock of time.perf_counter.
        kinds: the models to sample from; empty: the default models for a CPU or a GPU.
        known: {dtype: the rate in FLOP/s that the convolution phase measured}. If this phase's own probe measures
            less, other processes have slowed it, and this rate predicts the time of a step instead.
    """
    kinds = kinds or (ON_A_CARD if device.is_card else ON_A_CPU)
    total = len(kinds) * len(BATCHES)
    is_imported = False
    for number, kind in enumerate(kinds):
        images = _LazyImages(device, kind, (known or {}).get(kind.dtype, 0.0))
        for turn, batch in enumerate(BATCHES):
            name = f"loop {kind.model} {kind.dtype} batch {batch}"
            blank = Reading("loop", name, device.name, "s", None)
            left = total - number * len(BATCHES) - turn
            yield checked_device.guarded(
                blank, partial(_timed_loop, images, batch, _Time(until, left, is_imported), blank)
            )
            is_imported = is_imported or images.is_built
        del images
        gc.collect()
        device.let_go()


@dataclass(frozen=True)
class _Time:
    """Record the deadline of a number of loops, and whether the libraries have been imported."""

    until: float
    loops: int
    is_ready: bool

    @property
    def left(self) -> float:
        """Return the seconds left for all loops."""
        return self.until - time.perf_counter()

    @property
    def share(self) -> float:
        """Return the seconds for the next loop: half of an equal share, since the later loops take longer."""
        return self.left / self.loops / 2


class _Images:
    """Keep a model on a device and predict the cost of its steps; its weights are loaded at their first use."""

    def __init__(self, device: Device, kind: Kind, model: components.Model, rate: float) -> None:
        """Count the FLOPs of a model without weights. `rate`: FLOPs a second, until a step has been timed."""
        self.device, self.kind = device, kind
        self._model, self._rate, self._is_loaded = model, rate, False
        flops = model.flops()
        self._step, self._rest = flops.step, flops.batch - flops.step * flops.evaluations

    def seconds(self, batch: int, steps: int) -> float:
        """Return the predicted seconds of this many steps and the rest of an image, from the measured rate."""
        return batch * (self._step * steps + self._rest) / self._rate

    def step_seconds(self, batch: int) -> float:
        """Return the predicted seconds of a step."""
        return batch * self._step / self._rate

    def flops(self, batch: int) -> float:
        """Return the FLOPs of a step."""
        return float(batch * self._step)

    def learn(self, batch: int, seconds: float) -> None:
        """Set the rate from the measured seconds of a step."""
        self._rate = self.flops(batch) / seconds

    def variant(self, batch: int, steps: int) -> components.Model:
        """Return the model with its weights, for another batch."""
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
            raise SkipError(f"the weights take {size / 1e9:.1f} GB, and only {free / 1e9:.1f} GB are free")
        model.load({})
        self._is_loaded = True


class _LazyImages:
    """Build the images of one kind when a loop first has time for them."""

    def __init__(self, device: Device, kind: Kind, earlier_rate: float) -> None:
        """Build nothing yet. `earlier_rate`: FLOPs a second that convolutions have reached in this dtype."""
        self._device, self._kind, self._earlier_rate = device, kind, earlier_rate
        self._images: _Images | None = None

    @property
    def is_built(self) -> bool:
        """Return whether the model has been built."""
        return self._images is not None

    def get(self, time_: _Time) -> _Images:
        """Return the images; the first call builds the model on the meta device and predicts the cost.

        Raises:
            SkipError: there is no time for the model.
        """
        if self._images is None:
            self._images = _build(self._device, self._kind, self._earlier_rate, time_)
        return self._images


def _build(device: Device, kind: Kind, earlier_rate: float, time_: _Time) -> _Images:
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
    return _Images(device, kind, model, rate)


def _timed_loop(lazy: _LazyImages, batch: int, time_: _Time, blank: Reading) -> Reading:
    images = lazy.get(time_)
    count = _WARM + (_MAX_STEPS_CARD if images.device.is_card else _MAX_STEPS_CPU)
    # Twice the predicted cost, since a probe may be that far off and a loop that is given up has no figure.
    while count > _WARM + _FEWEST and 2 * images.seconds(batch, count) > time_.share:
        count -= 1
    price = images.seconds(batch, count)
    if price > time_.left:
        raise SkipError(_priced(images.step_seconds(batch), price, time_.left))
    variant = images.variant(batch, count)
    durations, finite = _image(images, variant, time_)
    steps = durations[_WARM:]
    median = statistics.median(steps)
    images.learn(batch, median)
    return replace(
        blank,
        value=median if finite else None,
        samples=steps,
        figures={"flops_per_second": images.flops(batch) / median, "steps": float(len(steps))},
        fault=None if finite else "the image contains NaN or infinity",
    )


def _image(images: _Images, variant: components.Model, time_: _Time) -> tuple[tuple[float, ...], bool]:
    """Make one image; return the seconds of its steps, and whether all its numbers are finite."""
    images.device.wait()
    components.set_precision(variant.torch, variant.case.dtype)
    clock = clocks.clock_for(variant.torch, images.device.name)
    make = sampling.Loop(variant)
    clock.start()
    pixels, raw = make(_both(clock.mark, _guard(images, variant.case, time_)))
    _, seconds = clock.stop()
    return seconds, numerics.look(pixels, raw, None).finite


def _guard(images: _Images, case: Case, time_: _Time) -> Callable[[], None]:
    """Return a function that checks the predicted cost after the second step on a CPU.

    The prediction comes from a probe, which may be far off.
    """
    marks: list[float] = []

    def check() -> None:
        marks.append(time.perf_counter())
        if len(marks) != 3 or images.device.is_card:
            return
        images.learn(case.batch, marks[2] - marks[1])
        price = images.seconds(case.batch, case.steps - 2)
        if price > time_.left:
            raise SkipError(_priced(marks[2] - marks[1], price, time_.left))

    return check


def _both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def _priced(step: float, whole: float, left: float) -> str:
    return f"a step takes about {step:.2g} s, the shortest loop {whole:.1f} s, and {max(left, 0.0):.1f} s are left"
