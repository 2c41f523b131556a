"""The fresh process of one case: runs under the measured interpreter, answers in JSON lines on its stdout."""

from __future__ import annotations

import math
import platform
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.core import axes, stats
from bench.core.codec import plain
from bench.core.errors import BUDGET, PARTNER, SkipError, is_unsupported
from bench.core.protocol import GO, Request
from bench.core.result import Case, Numerics, Phases, Result, Status, Work
from bench.worker import (
    clocks,
    compile_cost,
    components,
    cost,
    device_probe,
    host_load,
    max_size,
    numerics,
    sampling,
    timing,
)
from bench.worker import memory as device_memory

if TYPE_CHECKING:
    from collections.abc import Callable

_SLOW_STEP_SECONDS = 20.0
_LAST_SECONDS = 3.0  # what is left for comparing


def measure(request: Request, say: Callable[[dict[str, Any]], None]) -> Result:
    """Run one case; whatever goes wrong becomes a result with its reason, beside what was known until then."""
    found = _PartialResult(Result(request.case, Status.ERROR))
    try:
        _Measurement(request, say, found).run()
    except SkipError as error:
        found.add(status=Status.SKIPPED, reason=str(error))
    except MemoryError:
        found.add(status=Status.OOM, reason="the host has no memory left")
    except Exception as error:  # every failure of a library is this case's result, and the other cases go on
        text = f"{type(error).__name__}: {error}".strip()
        oom = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
        found.add(status=Status.OOM if oom else Status.ERROR, reason=text[:2000])
    return found.result


class _PartialResult:
    """What is known of a case so far."""

    def __init__(self, result: Result) -> None:
        self.result = result

    def add(self, **fields: Any) -> None:
        """Know more."""
        self.result = replace(self.result, **fields)


class _Measurement:
    """The phases of one case, in their order."""

    def __init__(self, request: Request, say: Callable[[dict[str, Any]], None], found: _PartialResult) -> None:
        self.request, self.say, self.found, self.case = request, say, found, request.case

    def run(self) -> None:
        torch, model = self._begin()
        rate = self._price(torch, model)
        peak = device_probe.Peak(torch, self.case.device, self.case.dtype, rate)
        if not self._is_slow:
            peak.ask()
        loop = self._load(torch, model)
        clock = clocks.clock_for(torch, self.case.device)
        memory = device_memory.Peaks(torch, self.case.device)
        first = self._first_image(loop, clock)
        self._samples(torch, loop, clock, memory, peak)
        self._after(torch, loop, first)

    def _begin(self) -> tuple[Any, components.Model]:
        began = time.perf_counter()
        self.say({"phase": "imports"})
        import diffusers
        import torch

        diffusers.utils.logging.set_verbosity_error()
        self.phases = Phases(imports_seconds=time.perf_counter() - began)
        if self.case.threads:
            torch.set_num_threads(self.case.threads)
        if self.case.dtype == "tf32" and not self.case.device.startswith("cuda"):
            raise SkipError("TF32 is a format of NVIDIA's cards alone")
        components.set_precision(torch, self.case.dtype)
        torch.set_grad_enabled(False)
        if self.case.device.startswith("cuda"):
            self.say({"card": str(getattr(torch.cuda.get_device_properties(self.case.device), "uuid", ""))})
        self.found.add(phases=self.phases, software=_software(torch, diffusers, self.case))
        asked = time.perf_counter() - (time.time() - self.request.asked_at)
        self.limit, self.share = asked + self.request.limit_seconds, asked + self.request.share_seconds
        checks = self.request.checks_seconds
        self.checks = self.limit if checks is None else asked + checks
        return torch, components.Model(torch, self.case)

    def _price(self, torch: Any, model: components.Model) -> float:
        """Predict the cost from the arithmetic and a probe, before anything is loaded."""
        self.say({"phase": "probe"})
        case = self.case
        cost.check_room(torch, case, model.weight_bytes)
        try:
            rate = device_probe.rate(torch, case.device, case.dtype, self.request.cpus)
        except (RuntimeError, TypeError) as error:
            if not is_unsupported(error):  # such as a card that a neighbour fills
                raise
            raise SkipError(f"{case.device} cannot compute in {case.dtype}: {str(error).splitlines()[0]}") from None
        rate = max(rate, self.request.rate_known or 0.0)
        price = cost.believed(torch, case, rate, self.request.rate_fp32)
        flops = model.flops()
        self.step_seconds = flops.step / price
        self.work = Work(
            flops_per_step=flops.step,
            flops_per_image=flops.batch // case.batch,
            probe_flops_per_second=rate,
            predicted_step_seconds=self.step_seconds,
            evaluations=flops.evaluations,
        )
        self.found.add(work=self.work, weights="real" if self.request.weights else "random")
        # The first image, and as many as a result needs; of a pair, the other's as well.
        self.images = 1 + (2 * stats.ENOUGH_SAMPLES if self.request.paced else stats.MIN_SAMPLES)
        self.say({"work": plain(self.work)})
        shortest = flops.batch / price * self.images
        if time.perf_counter() + shortest > self.limit:
            raise SkipError(cost.over(self.step_seconds, shortest, self.limit - time.perf_counter()))
        if axes.COMPILES[case.compile] is not None:
            self._price_compiling(model, shortest)
        return rate

    def _price_compiling(self, model: components.Model, rest: float) -> None:
        self.say({"phase": "probe of the compiler"})
        seconds = compile_cost.predict(model)
        self.work = replace(self.work, predicted_compile_seconds=seconds)
        self.found.add(work=self.work)
        self.say({"work": plain(self.work)})
        left = self.limit - time.perf_counter()
        if seconds + rest > left:
            raise SkipError(
                f"predicted {seconds:.0f} s to compile, and {rest:.0f} s for the shortest run; "
                f"{BUDGET} {max(left, 0):.0f} s"
            )

    @property
    def _is_slow(self) -> bool:
        """Whether what is not asked for by name would take too long beside the samples themselves."""
        return (self.work.predicted_step_seconds or 0.0) > _SLOW_STEP_SECONDS

    def _load(self, torch: Any, model: components.Model) -> sampling.Loop:
        self.say({"phase": "load"})
        device_memory.reset_host_peak()
        loading = time.perf_counter()
        model.load({name: Path(folder) for name, folder in self.request.weights.items()})
        loop = sampling.Loop(model)
        clocks.synchronize(torch, self.case.device)
        self.phases = replace(self.phases, load_seconds=time.perf_counter() - loading)
        self.load_peak = device_memory.host_peak_bytes() if device_memory.reset_host_peak() else None
        return loop

    def _first_image(self, loop: sampling.Loop, clock: clocks.Clock) -> str:
        self.say({"phase": "first image"})
        guard = cost.guard(self.case, self.work.evaluations or 1, self.images - 1, self.limit)
        clock.start()
        pixels, raw = loop(cost.both(clock.mark, guard))
        seconds, _ = clock.stop()
        self.phases = replace(self.phases, first_image_seconds=seconds)
        self.say({"phases": plain(self.phases)})
        self.numerics = numerics.look(pixels, raw, self.request.image)
        self.found.add(phases=self.phases, numerics=self.numerics)
        return numerics.digest(raw)

    def _samples(
        self,
        torch: Any,
        loop: sampling.Loop,
        clock: clocks.Clock,
        memory: device_memory.Peaks,
        peak: device_probe.Peak,
    ) -> None:
        self.say({"phase": "samples"})

        def pause() -> None:
            memory.pause()
            if not self._is_slow:
                self.say({"phase": "probe"})
                peak.ask()
                self.say({"phase": "samples"})
            memory.resume()

        neighbours = host_load.HostLoad()
        more = _at_a_word(loop.model) if self.request.paced else timing.until(self.share, self.limit)
        between = (lambda: None) if self.request.paced else pause
        images = timing.take(loop, clock, more, self.say, between, neighbours)
        if not images.every:
            raise SkipError(PARTNER)
        used = sum(sample.cpu_seconds for sample in images.every)
        host = neighbours.host(torch.get_num_threads(), used, sum(sample.seconds for sample in images.every))
        self.say({"phase": "probe"})
        memory.pause()
        if not self._is_slow:
            peak.ask()
        status, reason = self._outcome(images)
        self.found.add(
            status=status,
            reason=reason,
            warmups=tuple(images.warmups),
            samples=tuple(images.samples),
            memory=replace(memory.memory(), host_load_peak_bytes=self.load_peak),
            # A pair's images are made in turns: what changes meanwhile changes for both.
            work=replace(
                self.work,
                peak_flops_per_second=peak.best,
                copy_bytes_per_second=() if self.request.paced else tuple(peak.copies),
            ),
            host=host,
        )

    def _outcome(self, images: timing.TimedImages) -> tuple[Status, str | None]:
        if not self.numerics.finite:
            return Status.ERROR, "the image holds NaN or infinity"
        count = len(images.every)
        if not self.request.paced and count < stats.MIN_SAMPLES:
            seconds = images.every[-1].seconds
            return Status.TIMEOUT, f"an image took {seconds:.3g} s: after {count} {BUDGET} no time for another"
        return Status.OK, None

    def _after(self, torch: Any, loop: sampling.Loop, first: str) -> None:
        """One more image, which is looked into: the shares of its parts, its memory, whether it is the same again."""
        self.say({"phase": "checks"})
        image_seconds = max(sample.seconds for sample in self.found.result.samples)
        if time.perf_counter() + image_seconds * 1.5 > self.checks:
            self.found.add(numerics=replace(self.numerics, not_compared="the budget is spent"))
            return
        unet = loop.model.components["unet"]
        began = time.perf_counter()
        shares = timing.PhaseTimer(torch, self.case.device, loop.parts)
        with device_memory.UssPeak() as uss, numerics.Evaluation(unet) as kept, shares:
            _, raw = loop(lambda: None)
            clocks.synchronize(torch, self.case.device)
        self.found.add(
            shares=shares.seconds(),
            shares_of_seconds=time.perf_counter() - began,
            memory=replace(self.found.result.memory, host_run_uss_peak_bytes=uss.bytes),
        )
        self.numerics = replace(self.numerics, repeats=numerics.digest(raw) == first)
        del raw
        if self.request.find_max:
            self.say({"phase": "largest"})
            self.found.add(fit=max_size.largest(loop.model, self.checks - _LAST_SECONDS))
        self.found.add(numerics=self._compared(loop.model, kept))

    def _compared(self, model: components.Model, kept: numerics.Evaluation) -> Numerics:
        case = self.case
        if not self.request.compare:
            return replace(self.numerics, not_compared="the same was compared in a case before")
        if case.is_reference:
            return replace(self.numerics, not_compared="it is what others are compared with")
        if case.offload != "none":
            return replace(self.numerics, not_compared="its weights are moved to and fro")
        steps = [step for sample in self.found.result.samples for step in sample.step_seconds]
        if self._is_slow or time.perf_counter() + 4 * max([self.step_seconds, *steps]) > self.checks:
            return replace(self.numerics, not_compared="the budget is spent")
        try:
            error = numerics.forward_error(model, kept)
        except (MemoryError, RuntimeError) as fault:  # torch.OutOfMemoryError is the latter
            return replace(self.numerics, not_compared=str(fault).splitlines()[0][:200])
        return self._held(error, axes.TOLERANCES[case.dtype])

    def _held(self, error: float, limit: float) -> Numerics:
        if not error <= limit:  # nor a NaN
            reason = (
                f"one evaluation is {error:.2g} from fp32's (relative L2), {limit:.2g} is what {self.case.dtype} may"
            )
            self.found.add(status=Status.ERROR, reason=reason)
        if not math.isfinite(error):
            return replace(self.numerics, not_compared=f"its distance from fp32 is {error}", tolerance=limit)
        return replace(self.numerics, forward_error=error, tolerance=limit)


def _at_a_word(model: components.Model) -> Callable[[timing.TimedImages], bool]:
    """Another image at each "go". Its weights lie elsewhere: of a pair neither shall be faster by the luck of place."""
    chance = random.Random(model.case.seed)  # noqa: S311 (a sampling)

    def more(images: timing.TimedImages) -> bool:
        if sys.stdin.readline().strip() != GO:
            return False
        model.place_anew(chance, images.every[-1].seconds / 4 if images.every else _LAST_SECONDS)
        return True

    return more


def _software(torch: Any, diffusers: Any, case: Case) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if case.device.startswith("cuda"):
        found["cuda"] = str(torch.version.cuda)
        found["device"] = torch.cuda.get_device_name(case.device)
        found["tf32"] = str(torch.backends.cudnn.allow_tf32)
    return found
