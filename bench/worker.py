"""The fresh process of one case: runs under the measured interpreter, answers in JSON lines on its stdout."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench import meter, probes, sampling, stats
from bench.result import Case, Numerics, Phases, Result, Sample, Status, Work, dumps, plain, record

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_SAMPLES = 3
MAX_SAMPLES = 30
STEADY = 0.02


@dataclass(frozen=True)
class Request:
    """What the parent asks for.

    Both times count from `asked_at` (time.time of the parent): starting the process is part of them. After
    `share_seconds` no further sample is begun; a case that cannot end within `limit_seconds` is skipped.
    """

    case: Case
    asked_at: float
    share_seconds: float
    limit_seconds: float
    weights: str | None
    image: str | None


class SkipError(Exception):
    """The case cannot run here, or cannot end in time; the message says why."""


def main() -> int:
    """Read one request from stdin, answer on the real stdout, keep every print of a library off it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    raw = json.loads(sys.stdin.read())
    if raw == {"query": True}:
        import torch

        _say(answers, {"query": probes.query(torch)})
        return 0
    request: Request = record(raw, Request, "request")
    result = measure(request, lambda event: _say(answers, event))
    _say(answers, {"result": plain(result)})
    return 0


def measure(request: Request, say: Callable[[dict[str, Any]], None]) -> Result:
    """Run one case; whatever goes wrong becomes a result with its reason, beside what was known until then."""
    found = _Found(Result(request.case, Status.ERROR))
    try:
        _measure(request, say, found)
    except SkipError as error:
        found.add(status=Status.SKIPPED, reason=str(error))
    except MemoryError:
        found.add(status=Status.OOM, reason="the host has no memory left")
    except Exception as error:  # every failure of a library is this case's result, and the other cases go on
        text = f"{type(error).__name__}: {error}".strip()
        oom = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
        found.add(status=Status.OOM if oom else Status.ERROR, reason=text[:2000])
    return found.result


class _Found:
    """What is known of a case so far."""

    def __init__(self, result: Result) -> None:
        self.result = result

    def add(self, **fields: Any) -> None:  # noqa: ANN401 (any field of a result)
        """Know more."""
        self.result = replace(self.result, **fields)


def _measure(request: Request, say: Callable[[dict[str, Any]], None], found: _Found) -> None:
    case = request.case
    began = time.perf_counter()
    say({"phase": "imports"})
    import diffusers
    import torch

    phases = Phases(imports_seconds=time.perf_counter() - began)
    found.add(phases=phases, software=_software(torch, diffusers, case.device))
    asked = time.perf_counter() - (time.time() - request.asked_at)
    limit, share = asked + request.limit_seconds, asked + request.share_seconds
    torch.set_grad_enabled(False)

    say({"phase": "probe"})
    try:
        rate = probes.rate(torch, case.device, case.dtype)
    except RuntimeError as error:
        raise SkipError(f"{case.device} cannot compute in {case.dtype}: {str(error).splitlines()[0]}") from None
    model = sampling.Model(torch, case)
    flops = model.flops()
    work = Work(
        flops_per_step=flops.step,
        flops_per_image=flops.batch // case.batch,
        probe_flops_per_second=rate,
        predicted_step_seconds=flops.step / rate,
    )
    found.add(work=work, weights="real" if request.weights else "random")
    shortest = flops.batch / rate * (1 + MIN_SAMPLES)
    if time.perf_counter() + shortest > limit:
        raise SkipError(_over(flops.step / rate, shortest, limit - time.perf_counter()))

    say({"phase": "load"})
    phased = meter.reset_host_peak()
    meter.reset_device_peak(torch, case.device)
    loading = time.perf_counter()
    loop = model.load(Path(request.weights) if request.weights else None)
    if case.device.startswith("cuda"):
        torch.cuda.synchronize(case.device)
    phases = replace(phases, load_seconds=time.perf_counter() - loading)
    load_peak = meter.host_peak_bytes()
    meter.reset_host_peak()

    say({"phase": "first image"})
    clock = meter.clock_for(torch, case.device)
    guard = _guard(case, limit)
    clock.start()
    images, raw = loop(_both(clock.mark, guard))
    seconds, _ = clock.stop()
    phases = replace(phases, first_image_seconds=seconds)
    say({"phases": plain(phases)})
    numerics = _numerics(images, raw, request.image)
    found.add(phases=phases, numerics=numerics)

    say({"phase": "samples"})
    neighbours = meter.Neighbours()
    samples = sample_loop(loop, clock, share, say)
    threads = torch.get_num_threads()
    used = sum(sample.cpu_seconds for sample in samples)
    found.add(
        status=Status.OK if numerics.finite else Status.ERROR,
        reason=None if numerics.finite else "the image holds NaN or infinity",
        samples=tuple(samples),
        memory=meter.memory(torch, case.device, load_peak, phases=phased),
        host=neighbours.host(threads, used, sum(sample.seconds for sample in samples)),
    )


def sample_loop(
    loop: Callable[[Callable[[], None]], Any],
    clock: meter.Clock,
    share: float,
    say: Callable[[dict[str, Any]], None],
) -> list[Sample]:
    """Time whole loops until the median is known well enough, or the share of the budget is spent.

    Args:
        loop: one image; it is handed the clock's mark and nothing else.
        clock: of the device.
        share: the time (time.perf_counter) after which no sample is begun.
        say: told each sample.
    """
    samples: list[Sample] = []
    while _wants_more(samples, share):
        before = time.process_time()
        clock.start()
        loop(clock.mark)
        seconds, steps = clock.stop()
        samples.append(Sample(seconds, steps, time.process_time() - before))
        say({"sample": plain(samples[-1])})
    return samples


def _wants_more(samples: list[Sample], share: float) -> bool:
    """Until the median is known within 2 %, or time is up; never fewer than three."""
    if len(samples) < MIN_SAMPLES:
        return True
    if len(samples) >= MAX_SAMPLES:
        return False
    if time.perf_counter() + samples[-1].seconds > share:
        return False
    return stats.summarize([sample.seconds for sample in samples]).spread > STEADY


def _guard(case: Case, limit: float) -> Callable[[], None]:
    """Watches the first image: two steps tell what the whole case will cost. Only where the host's clock counts."""
    marks: list[float] = []

    def look() -> None:
        marks.append(time.perf_counter())
        if len(marks) != 3 or case.device != "cpu":
            return
        step = marks[2] - marks[1]
        rest = step * (case.steps - 2) + step * case.steps * MIN_SAMPLES
        left = limit - marks[2]
        if rest > left:
            raise SkipError(_over(step, rest, left))

    return look


def _over(step: float, whole: float, left: float) -> str:
    return f"predicted {step:.3g} s a step, {whole:.0f} s for the shortest run; the budget leaves {max(left, 0):.0f} s"


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def _numerics(images: Any, raw: Any, path: str | None) -> Numerics:  # noqa: ANN401
    """Whether every number is finite, also before it is clamped to a picture; the first picture is kept as PNG."""
    finite = bool(images.isfinite().all()) and bool(raw.isfinite().all())
    pixels = (images[0].nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous()
    if path is not None:
        from PIL import Image

        Image.fromarray(pixels.numpy()).save(path)
    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    return Numerics(finite=finite, image=Path(path).name if path else None, image_sha256=digest)


def _software(torch: Any, diffusers: Any, device: str) -> dict[str, str]:  # noqa: ANN401
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if device.startswith("cuda"):
        found["cuda"] = str(torch.version.cuda)
        found["device"] = torch.cuda.get_device_name(device)
        # What fp32 means on this card: cuDNN's convolutions default to TF32, matrix products do not.
        found["tf32 convolution"] = str(torch.backends.cudnn.allow_tf32)
        found["tf32 matmul"] = str(torch.backends.cuda.matmul.allow_tf32)
    return found


def _say(answers: IO[str], event: dict[str, Any]) -> None:
    answers.write(dumps(event) + "\n")
    answers.flush()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Nothing is left to do, and a library's teardown must not turn a good result into a crash.
    os._exit(code)
