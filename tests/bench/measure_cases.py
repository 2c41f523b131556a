"""Measures cases with real torch and diffusers for the tests of bench/worker; one process, as imports are slow."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.core import axes, worker_events, worker_requests
from bench.core.codec import plain
from bench.core.errors import SkipError
from bench.core.result import Case, Sample
from bench.worker import compile_cost, components, device_probe, max_size, measurement, predicted_time, sampling, timing
from bench.worker import memory as device_memory
from tests.clock import Processor, Ticking

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = Case("tiny-ddpm", "cpu", "fp32", "ddim", steps=4, batch=1, height=16, width=16)
TINY_SD = Case("tiny-sd", "cpu", "bf16", "dpmpp-karras", steps=3, batch=2, height=64, width=64)
CAT = Case("ddpm-cat-256", "cpu", "fp32", "ddpm", steps=50, batch=1, height=64, width=64)
SD = Case("stable-diffusion-v1-5", "cpu", "fp32", "dpmpp-karras", steps=20, batch=1, height=512, width=512)
FOLDER = Path(sys.argv[1])
FILL = components.Model._fill
# (model, task) for each task of each tiny model.
TASKS = [(model, task) for model in axes.models() if model.startswith("tiny-") for task in axes.tasks(model)]


def measure_case(
    case: Case,
    *,
    limit_seconds: float = 1e6,
    weights: Path | None = None,
    image: str | None = None,
    rate_known: float | None = None,
    asked_at: float | None = None,
) -> Any:
    """Measure a case with the fewest samples; return {"result", "events"} in JSON types.

    Args:
        case: the case.
        limit_seconds: the time limit of the case.
        weights: the snapshot with the weights; None: random weights.
        image: the name of the picture to write into FOLDER; None: no picture.
        rate_known: the FLOP/s that an earlier case has measured, if any.
        asked_at: the time of the request; None: now.
    """
    path = str(FOLDER / image) if image else None
    folders = {case.model: str(weights)} if weights else {}
    request = worker_requests.CaseRequest(
        case,
        asked_at if asked_at is not None else time.time(),
        0.0,
        limit_seconds,
        folders,
        path,
        rate_known=rate_known,
    )
    events: list[worker_events.WorkerEvent] = []
    result = plain(measurement.measure(request, events.append))
    return {"result": result, "events": [json.loads(worker_events.encode(event)) for event in events]}


def architecture(case: Case) -> Any:
    """Return the parameters of each component, and the FLOPs of a step and of a batch, without allocating weights."""
    model = components.Model(torch, case)
    parameters = {name: list(component.parameters()) for name, component in model.components.items()}
    flops = model.flops()
    return {
        "parameters": {name: sum(part.numel() for part in parts) for name, parts in parameters.items()},
        "devices": sorted({part.device.type for parts in parameters.values() for part in parts}),
        "step": flops.step,
        "batch": flops.batch,
    }


def snapshot(name: str, case: Case, *, seed: int, variant: str | None = None, pickled: bool = False) -> Path:
    """Write a snapshot folder of a model with the random weights of a seed, as .safetensors or pickled; return it."""
    folder = FOLDER / name
    model = components.Model(torch, replace(case, seed=seed))
    model.load({})
    for part, component in model.components.items():
        place = folder if case.model == "tiny-ddpm" else folder / part
        component.save_pretrained(place, safe_serialization=True, variant=variant)
    if pickled:
        for file in folder.glob("*.safetensors"):
            torch.save(model.components["unet"].state_dict(), file.with_suffix(".bin"))
            file.unlink()
    return folder


def fill_with_nan(self: components.Model, component: Any, device: str) -> Any:
    """Fill a component with random weights, of which one is NaN; it takes the place of Model._fill."""
    component = FILL(self, component, device)
    next(component.parameters()).view(-1)[0] = float("nan")
    return component


def out_of_memory(self: components.Model, component: Any, device: str) -> Any:
    """Request 2**60 numbers, so that torch's CPU allocator raises its error; it takes the place of Model._fill."""
    torch.empty(1 << 60)
    return component


def single_image(*_: object) -> timing.TimedImages:
    """Return one image of 250 s, as from a machine on which one image takes all the time."""
    return timing.TimedImages([Sample(250.0, (62.5,) * 4, 250.0)])


def loops() -> dict[str, Any]:
    """Make an image for every task, scheduler, attention and VAE setting; return {name: result of `make_image`}."""
    tiny = Case("tiny-sd", "cpu", "fp32", "ddim", steps=4, batch=2, height=64, width=64)
    cases = {f"{model} {task}": replace(tiny, model=model, task=task) for model, task in TASKS}
    cases |= {f"{name} on a pipeline": replace(tiny, scheduler=name) for name in axes.SCHEDULERS}
    cases |= {f"{name} written out": replace(tiny, model="tiny-ddpm", scheduler=name) for name in axes.SCHEDULERS}
    cases |= {
        f"{name} half-way": replace(tiny, task="image-to-image", scheduler=name, steps=10)
        for name in ("ddim", "heun", "pndm", "kdpm2-a", "dpmpp-2s")
    }
    cases |= {
        "image-to-image of one step": replace(tiny, task="image-to-image", steps=1),
        "kdpm2-a of two steps": replace(tiny, scheduler="kdpm2-a", steps=2),
        "heun of one step": replace(tiny, scheduler="heun", steps=1),
    }
    for name in axes.ATTENTIONS:
        cases[f"attention {name}"] = replace(tiny, attention=name)
        cases[f"attention {name} written out"] = replace(tiny, model="tiny-ddpm", attention=name)
    cases |= {f"vae {name}": replace(tiny, vae=name) for name in axes.VAES}
    cases |= {
        "offload model": replace(tiny, offload="model"),
        "vae of none": replace(tiny, model="tiny-ddpm", vae="tiling"),
    }
    return {name: make_image(case) for name, case in cases.items()}


@functools.cache
def tiny_model(name: str, _attention: str, _vae: str) -> components.Model:
    """Return a tiny model with its weights, built once for each attention and VAE setting, which change the model."""
    model = components.Model(torch, Case(name, "cpu", "fp32", "ddim", steps=4, batch=2, height=64, width=64))
    model.load({})
    return model


def make_image(case: Case) -> Any:
    """Make the image of a case twice; return the predicted and real number of evaluations, and facts of the image.

    A case that cannot run returns {"skipped": reason}.
    """
    model = copy.copy(tiny_model(case.model, case.attention, case.vae))
    model.case = case
    model.task = case.task or axes.tasks(case.model)[0]
    try:
        predicted = model.evaluations()
        loop = sampling.Loop(model)
    except SkipError as error:
        return {"skipped": str(error)}
    marks: list[int] = []
    pixels, raw = loop(lambda: marks.append(0))
    parts = timing.PhaseTimer(torch, "cpu", loop.parts)
    with parts:
        again = loop(lambda: None).raw
    return {
        "predicted": predicted,
        "marks": len(marks),
        "shape": list(pixels.shape),
        "finite": bool(raw.isfinite().all()),
        "low": float(pixels.min()),
        "high": float(pixels.max()),
        "parts": parts.seconds(),
        "same": bool((again == raw).all()),
        "is whole again": not any("forward" in vars(part) for part in model.components.values()),
    }


def run_paced() -> Any:
    """Run a measurement that makes an image for each line "go": three such lines, then another word."""
    words = iter(["go\n", "go\n", "go\n", "no\n"])
    request = worker_requests.CaseRequest(TINY, time.time(), 0.0, 1e6, {}, None, paced=True, compare=False)
    stdin = sys.stdin
    sys.stdin = type("Words", (), {"readline": lambda _: next(words)})()
    try:
        return plain(measurement.measure(request, lambda _: None))
    finally:
        sys.stdin = stdin


def move_weights() -> dict[str, Any]:
    """Move a model's weights in memory between two images; return how many moved, and whether the images are equal."""
    model = components.Model(torch, replace(TINY, layout="channels_last"))
    model.load({})
    loop = sampling.Loop(model)
    before = loop(lambda: None).raw
    weights = list(model.components["unet"].parameters())
    addresses = [weight.data_ptr() for weight in weights]
    strides = [weight.stride() for weight in weights]
    tensors = [
        weight.data for weight in weights
    ]  # keeps the old memory allocated, so that no weight is moved back into it

    def moved(seconds: float) -> int:
        model.reallocate_weights(random.Random(0), seconds)  # noqa: S311 (a sampling)
        return sum(weight.data_ptr() != address for weight, address in zip(weights, addresses, strict=True))

    counts = {"all": len(weights), "in no time": moved(0.0), "moved": moved(math.inf)}
    model.case = replace(model.case, device="cuda:0")
    again = moved(math.inf)
    return counts | {
        "of a card": again - counts["moved"],
        "same": bool((loop(lambda: None).raw == before).all()),
        "strides": strides == [weight.stride() for weight in weights] and len(tensors) == len(weights),
    }


def find_largest() -> dict[str, Any]:
    """Search the largest batch and image size with 100 MiB of free memory, with none, without time, and compiled."""
    model = components.Model(torch, replace(TINY_SD, dtype="fp32", batch=1))
    model.load({})
    free = device_memory.free_bytes
    sizes = {}
    try:
        for name, memory in (("some", 100 << 20), ("none", -1)):
            device_memory.free_bytes = functools.partial(int, memory)
            sizes[name] = plain(max_size.largest(model, math.inf))
    finally:
        device_memory.free_bytes = free
    sizes["no time"] = plain(max_size.largest(model, time.perf_counter()))
    compiled = components.Model(torch, replace(TINY_SD, compile="compiled"))
    sizes["compiled"] = plain(max_size.largest(compiled, math.inf))
    return sizes


def next_of(ahead: Iterator[float], _: object) -> float:
    """Return the next duration instead of timing the call."""
    return next(ahead)


def run_probe() -> dict[str, Any]:
    """Run the probe of the device's rate with given durations, then really with two threads and with one.

    The durations are those of a quiet machine, of a slow first call, and of calls that other work disturbs.
    """
    rates = {}
    for name, first in {"quiet": [], "slow start": [5.0], "other work": [5.0, 1.0, 2.0, 1.0]}.items():
        ahead = itertools.chain(first, itertools.cycle([0.001, 0.001, 1.0, 1.0] if len(first) > 1 else [0.001]))
        rates[name] = device_probe._rate(torch, "cpu", "fp32", functools.partial(next_of, ahead))
    torch.set_num_threads(2)
    two = device_probe.rate(torch, "cpu", "fp32")
    result = {"rates": rates, "threads kept": torch.get_num_threads(), "two": two}
    torch.set_num_threads(1)
    kernels = {name: device_probe.has_kernels(torch, "cpu", name) for name in ("fp32", "bf16", "fp16")}
    return result | {"one": device_probe.rate(torch, "cpu", "fp32"), "kernels": kernels}


def attention_of_cuda(limit: int) -> Any:
    """Return an attention function that rejects heads larger than `limit` if only one kernel is enabled, as CUDA does.

    Source of the rule: torch's sdp_utils.cpp. The message is torch's own.
    """
    real = torch.nn.functional.scaled_dot_product_attention

    def scaled_dot_product_attention(query: Any, *args: Any, **named: Any) -> Any:
        is_alone = not torch.backends.cuda.math_sdp_enabled()
        if is_alone and query.device.type != "meta" and query.shape[-1] > limit:
            raise RuntimeError("No available kernel. Aborting execution.")
        return real(query, *args, **named)

    return scaled_dot_product_attention


def forced_attention() -> dict[str, Any]:
    """Measure cases with a forced attention kernel: it accepts all, some or no calls, or this machine lacks it."""
    results = {}
    functional = torch.nn.functional
    case = replace(TINY_SD, dtype="fp32", attention="flash")  # heads of 4 and 8 in the UNet, and of 16 in the VAE
    for name, limit in (("all", 16), ("some", 8), ("none", 2)):
        with patched(functional, "scaled_dot_product_attention", attention_of_cuda(limit)):
            results[name] = measure_case(case)
    results["missing"] = measure_case(replace(case, attention="cudnn"))
    return results


def raise_unsupported(*_: object) -> float:
    """Raise an error such as a device without kernels for a dtype, or a machine without a compiler, raises."""
    raise RuntimeError("not implemented for 'Half'\nand a trace")


def raise_out_of_memory(*_: object) -> float:
    """Raise the error of a GPU whose memory is in use by another process."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def main() -> None:
    """Measure everything and print the results as one line of JSON."""
    Processor().own()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    probe = run_probe()
    # The real probe runs once per dtype; later cases use its cached result.
    device_probe.rate = functools.cache(device_probe.rate)
    device_probe._PEAK_SECONDS, device_probe._PROBE_SECONDS, device_probe._COPY_BYTES = 0.005, 0.002, 1 << 20
    timing._LEAST_SECONDS = 0.0
    results: dict[str, Any] = {"query": device_probe.query(torch), "probe": probe}
    results["cat"] = architecture(CAT)
    results["cat 256"] = architecture(replace(CAT, height=256, width=256))
    results["cat batch 3"] = architecture(replace(CAT, batch=3))
    results["sd"] = architecture(SD)
    whole = snapshot("whole", TINY, seed=0)
    other = snapshot("other", TINY, seed=1, variant="fp16")
    pickled = snapshot("pickled", TINY, seed=0, pickled=True)
    parts = snapshot("parts", TINY_SD, seed=0)
    results["tiny"] = measure_case(TINY, image="tiny.png")
    results["tiny again"] = measure_case(TINY)
    results["tiny seed 1"] = measure_case(replace(TINY, seed=1))
    results["tiny channels_last"] = measure_case(replace(TINY, layout="channels_last"))
    results["tiny ddpm"] = measure_case(replace(TINY, scheduler="ddpm"))
    results["tiny dpmpp-karras"] = measure_case(replace(TINY, scheduler="dpmpp-karras", batch=2))
    results["tiny-sd"] = measure_case(TINY_SD, image="sd.png")
    results["tiny-sd again"] = measure_case(TINY_SD)
    results["whole"] = measure_case(TINY, weights=whole)
    results["other"] = measure_case(TINY, weights=other)
    results["pickled"] = measure_case(TINY, weights=pickled)
    results["parts"] = measure_case(TINY_SD, weights=parts)
    results["tiny fp16"] = measure_case(replace(TINY_SD, dtype="fp16"))
    results["tiny sliced"] = measure_case(replace(TINY_SD, dtype="fp32", attention="sliced"))
    results["tf32"] = measure_case(replace(TINY, dtype="tf32"))
    results["wrong"] = with_patch(axes, "TOLERANCES", dict.fromkeys(axes.TOLERANCES, 1e-9), replace(TINY, dtype="bf16"))
    results["threads"] = measure_case(replace(TINY, threads=2))
    torch.set_num_threads(1)
    results["loops"] = loops()
    results["forced attention"] = forced_attention()
    results["paced"] = run_paced()
    results["placed"] = move_weights()
    results["fits"] = find_largest()
    too_long = replace(CAT, steps=1000)
    results["too long"] = with_patch(device_probe, "rate", lambda *_: 1e10, too_long, limit_seconds=5.0)
    results["no dtype"] = with_patch(device_probe, "rate", raise_unsupported, TINY)
    results["filled"] = with_patch(device_probe, "rate", raise_out_of_memory, TINY)
    # The probe's rate is far too high: the first image shows that after two steps.
    clock, many = Ticking(0.01), replace(TINY, steps=1000)
    with patched(measurement, "time", clock), patched(predicted_time, "time", clock):
        high = {"limit_seconds": 2.0, "asked_at": clock.now}
        results["overrated"] = with_patch(device_probe, "rate", lambda *_: 1e12, many, **high)
    # The probe was disturbed, and an earlier rate of the device is known.
    results["underrated"] = with_patch(device_probe, "rate", lambda *_: 1e3, TINY, rate_known=1e12)
    results["too few"] = with_patch(timing, "take", single_image, TINY)
    with patched(compile_cost, "time", Ticking(31.0)):
        results["compiled"] = measure_case(replace(TINY, compile="compiled"), limit_seconds=30.0)
    results["no compiler"] = with_patch(torch, "compile", raise_unsupported, replace(TINY, compile="compiled"))
    results["poisoned"] = with_patch(components.Model, "_fill", fill_with_nan, TINY, image="nan.png")
    results["no memory"] = with_patch(components.Model, "_fill", out_of_memory, TINY)
    sys.stdout.write(json.dumps(results) + "\n")


@contextmanager
def patched(owner: Any, name: str, instead: Any) -> Iterator[None]:
    """Replace the attribute `name` of `owner` by `instead` in the `with` block."""
    original = getattr(owner, name)
    setattr(owner, name, instead)
    try:
        yield
    finally:
        setattr(owner, name, original)


def with_patch(owner: Any, name: str, instead: Any, case: Case, **rest: Any) -> Any:
    """Measure a case while the attribute `name` of `owner` is replaced by `instead`."""
    with patched(owner, name, instead):
        return measure_case(case, **rest)


main()
