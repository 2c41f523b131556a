"""Questions about the work itself: seconds a step of the sampling loops, at batch 1 and 4, with random weights."""

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
_WARM, _FEWEST = 1, 3  # steps: those that do not count, and those that do
_MOST_OF_A_CPU, _MOST_OF_A_CARD = 8, 20
# What importing diffusers and building a first UNet without its weights take on a shared 2-core host.
_BUILD_SECONDS = 5.0
_CAUTION = 1.5  # of a model's weights, which is what else a step needs
_REACH = 0.5  # of what a good convolution reaches a whole UNet does about so much (0.4 to 0.7 on a 2-core host)


@dataclass(frozen=True)
class Kind:
    """A model as it is asked for: the shapes are those of the suites."""

    model: str
    dtype: str
    scheduler: str
    size: int

    def case(self, device: str, batch: int, steps: int) -> Case:
        """A case of it."""
        return Case(self.model, device, self.dtype, self.scheduler, steps, batch, self.size, self.size)


ON_A_CPU = (Kind("ddpm-cat-256", "fp32", "ddim", 64), Kind("stable-diffusion-v1-5", "bf16", "dpmpp-karras", 128))
ON_A_CARD = (Kind("ddpm-cat-256", "fp16", "ddim", 256), Kind("stable-diffusion-v1-5", "fp16", "dpmpp-karras", 512))


def loop(
    device: Device, until: float, kinds: Sequence[Kind] = (), known: Mapping[str, float] | None = None
) -> Iterator[Reading]:
    """Seconds a step of each loop that there is time for.

    Args:
        device: is asked.
        until: the time (time.perf_counter) after which none is begun that will not end before it.
        kinds: which, else those of the device.
        known: {dtype: FLOPs a second that its convolutions have reached before}. A probe that finds less was disturbed.
    """
    kinds = kinds or (ON_A_CARD if device.is_card else ON_A_CPU)
    whole = len(kinds) * len(BATCHES)
    built = False
    for number, kind in enumerate(kinds):
        made = _LazyImages(device, kind, (known or {}).get(kind.dtype, 0.0))
        for turn, batch in enumerate(BATCHES):
            name = f"loop {kind.model} {kind.dtype} batch {batch}"
            blank = Reading("loop", name, device.name, "s", None)
            left = whole - number * len(BATCHES) - turn
            yield checked_device.guarded(blank, partial(_asked, made, batch, _Time(until, left, built), blank))
            built = built or made.is_built
        del made
        gc.collect()
        device.let_go()


@dataclass(frozen=True)
class _Time:
    """Until when there is time for so many loops, and whether the libraries have been imported."""

    until: float
    loops: int
    is_ready: bool

    @property
    def left(self) -> float:
        """Seconds for all of them."""
        return self.until - time.perf_counter()

    @property
    def share(self) -> float:
        """Seconds for the next one: half of what would be fair, since those after it take longer."""
        return self.left / self.loops / 2


class _Images:
    """A model on a device, built without memory, and the predicted cost of a step. Its weights come at first use."""

    def __init__(self, device: Device, kind: Kind, model: components.Model, rate: float) -> None:
        """Count the arithmetic. `rate`: FLOPs a second, until a step was timed."""
        self.device, self.kind = device, kind
        self._model, self._rate, self._is_loaded = model, rate, False
        flops = model.flops()
        self._step, self._rest = flops.step, flops.batch - flops.step * flops.evaluations

    def seconds(self, batch: int, steps: int) -> float:
        """What so many steps and an image will take, by what the device has reached."""
        return batch * (self._step * steps + self._rest) / self._rate

    def step_seconds(self, batch: int) -> float:
        """What a step will take."""
        return batch * self._step / self._rate

    def flops(self, batch: int) -> float:
        """Of a step."""
        return float(batch * self._step)

    def learn(self, batch: int, seconds: float) -> None:
        """A step took so long: the next price is by that."""
        self._rate = self.flops(batch) / seconds

    def variant(self, batch: int, steps: int) -> components.Model:
        """It, with its weights, for another batch."""
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
            raise SkipError(f"its weights take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        model.load({})
        self._is_loaded = True


class _LazyImages:
    """The images of one kind: built when a loop of it first has time."""

    def __init__(self, device: Device, kind: Kind, known: float) -> None:
        """Build nothing yet. `known`: FLOPs a second that the device's convolutions have reached in this dtype."""
        self._device, self._kind, self._known = device, kind, known
        self._images: _Images | None = None

    @property
    def is_built(self) -> bool:
        """Return whether the model is built."""
        return self._images is not None

    def get(self, time_: _Time) -> _Images:
        """Return the images; build the model and price it at the first call, without memory.

        Raises:
            SkipError: there is no time for it.
        """
        if self._images is None:
            self._images = _build(self._device, self._kind, self._known, time_)
        return self._images


def _build(device: Device, kind: Kind, known: float, time_: _Time) -> _Images:
    if not time_.is_ready and time_.left < _BUILD_SECONDS:
        raise SkipError(f"{_BUILD_SECONDS:.0f} s are what building it takes, and {max(time_.left, 0):.1f} s are left")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    torch = device.torch
    components.set_precision(torch, kind.dtype)
    model = components.Model(torch, kind.case(device.name, 1, _WARM + _FEWEST))
    rate = _REACH * max(known, device_probe.rate(torch, device.name, kind.dtype))
    return _Images(device, kind, model, rate)


def _asked(lazy: _LazyImages, batch: int, time_: _Time, blank: Reading) -> Reading:
    made = lazy.get(time_)
    wanted = _WARM + (_MOST_OF_A_CARD if made.device.is_card else _MOST_OF_A_CPU)
    # Twice its price: a probe may be so far off, and a loop that was given up has no figure at all.
    while wanted > _WARM + _FEWEST and 2 * made.seconds(batch, wanted) > time_.share:
        wanted -= 1
    price = made.seconds(batch, wanted)
    if price > time_.left:
        raise SkipError(_priced(made.step_seconds(batch), price, time_.left))
    variant = made.variant(batch, wanted)
    found, finite = _image(made, variant, time_)
    steps = found[_WARM:]
    median = statistics.median(steps)
    made.learn(batch, median)
    return replace(
        blank,
        value=median if finite else None,
        samples=steps,
        figures={"flops_per_second": made.flops(batch) / median, "steps": float(len(steps))},
        fault=None if finite else "the image holds NaN or infinity",
    )


def _image(made: _Images, variant: components.Model, time_: _Time) -> tuple[tuple[float, ...], bool]:
    """One image: the seconds of its steps, and whether each of its numbers is one."""
    made.device.wait()
    components.set_precision(variant.torch, variant.case.dtype)
    clock = clocks.clock_for(variant.torch, made.device.name)
    make = sampling.Loop(variant)
    clock.start()
    pixels, raw = make(_both(clock.mark, _guard(made, variant.case, time_)))
    _, seconds = clock.stop()
    return seconds, numerics.look(pixels, raw, None).finite


def _guard(made: _Images, case: Case, time_: _Time) -> Callable[[], None]:
    """Looks at the second step, where the host's clock tells: a price by a probe may be far off."""
    marks: list[float] = []

    def look() -> None:
        marks.append(time.perf_counter())
        if len(marks) != 3 or made.device.is_card:
            return
        made.learn(case.batch, marks[2] - marks[1])
        price = made.seconds(case.batch, case.steps - 2)
        if price > time_.left:
            raise SkipError(_priced(marks[2] - marks[1], price, time_.left))

    return look


def _both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def _priced(step: float, whole: float, left: float) -> str:
    return f"a step takes about {step:.2g} s, the shortest loop {whole:.1f} s, and {max(left, 0.0):.1f} s are left"
