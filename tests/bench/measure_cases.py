"""What test_measurement.py asks of real torch and diffusers, in one process: importing them takes longest."""

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

from bench.core import axes, protocol, worker_events
from bench.core.codec import plain
from bench.core.errors import SkipError
from bench.core.result import Case, Sample
from bench.worker import compile_cost, components, cost, device_probe, max_size, measurement, sampling, timing
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
# Every task, with the tiny model of it.
TASKS = [(model, task) for model in axes.models() if model.startswith("tiny-") for task in axes.tasks(model)]


def measured(
    case: Case,
    *,
    limit_seconds: float = 1e6,
    weights: Path | None = None,
    image: str | None = None,
    rate_known: float | None = None,
    asked_at: float | None = None,
) -> Any:
    """One case, with the shortest number of samples; its result and its events as plain JSON."""
    path = str(FOLDER / image) if image else None
    folders = {case.model: str(weights)} if weights else {}
    request = protocol.Request(
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
    """The size of a model and the arithmetic of one step, all of it on the meta device."""
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
    """A model's folder as the hub keeps it, with the weights that a random one of this seed would have."""
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


def poisoned(self: components.Model, component: Any, device: str) -> Any:
    """Random weights, one of which is no number."""
    component = FILL(self, component, device)
    next(component.parameters()).view(-1)[0] = float("nan")
    return component


def out_of_memory(self: components.Model, component: Any, device: str) -> Any:
    """What torch's CPU allocator says, on a request that no machine can meet."""
    torch.empty(1 << 60)
    return component


def taken_once(*_: object) -> timing.TimedImages:
    """A machine on which one image takes all the time that there is."""
    return timing.TimedImages([Sample(250.0, (62.5,) * 4, 250.0)])


def loops() -> dict[str, Any]:
    """Every task, scheduler, attention and VAE setting: how many evaluations were foretold, and how many there were."""
    tiny = Case("tiny-sd", "cpu", "fp32", "ddim", steps=4, batch=2, height=64, width=64)
    cases = {f"{model} {task}": replace(tiny, model=model, task=task) for model, task in TASKS}
    cases |= {f"{name} on a pipeline": replace(tiny, scheduler=name) for name in axes.SCHEDULERS}
    cases |= {f"{name} written out": replace(tiny, model="tiny-ddpm", scheduler=name) for name in axes.SCHEDULERS}
    cases |= {
        f"{name} half-way": replace(tiny, task="image-to-image", scheduler=name, steps=10)
        for name in ("ddim", "heun", "pndm", "kdpm2-a", "dpmpp-2s")
    }
    for name in axes.ATTENTIONS:
        cases[f"attention {name}"] = replace(tiny, attention=name)
        cases[f"attention {name} written out"] = replace(tiny, model="tiny-ddpm", attention=name)
    cases |= {f"vae {name}": replace(tiny, vae=name) for name in axes.VAES}
    cases |= {
        "offload model": replace(tiny, offload="model"),
        "vae of none": replace(tiny, model="tiny-ddpm", vae="tiling"),
    }
    return {name: looped(case) for name, case in cases.items()}


@functools.cache
def built(name: str, _attention: str, _vae: str) -> components.Model:
    """A tiny model with its weights; these two settings change its components."""
    model = components.Model(torch, Case(name, "cpu", "fp32", "ddim", steps=4, batch=2, height=64, width=64))
    model.load({})
    return model


def looped(case: Case) -> Any:
    """One image, without a measurement around it."""
    model = copy.copy(built(case.model, case.attention, case.vae))
    model.case = case
    model.task = case.task or axes.tasks(case.model)[0]
    try:
        foretold = model.evaluations()
        loop = sampling.Loop(model)
    except SkipError as error:
        return {"skipped": str(error)}
    marks: list[int] = []
    pixels, raw = loop(lambda: marks.append(0))
    parts = timing.PhaseTimer(torch, "cpu", loop.parts)
    with parts:
        again = loop(lambda: None).raw
    return {
        "foretold": foretold,
        "marks": len(marks),
        "shape": list(pixels.shape),
        "finite": bool(raw.isfinite().all()),
        "low": float(pixels.min()),
        "high": float(pixels.max()),
        "parts": parts.seconds(),
        "same": bool((again == raw).all()),
        "is whole again": not any("forward" in vars(part) for part in model.components.values()),
    }


def paced() -> Any:
    """A worker that makes images at a word: three, then another word."""
    words = iter(["go\n", "go\n", "go\n", "no\n"])
    request = protocol.Request(TINY, time.time(), 0.0, 1e6, {}, None, paced=True, compare=False)
    kept = sys.stdin
    sys.stdin = type("Words", (), {"readline": lambda _: next(words)})()
    try:
        return plain(measurement.measure(request, lambda _: None))
    finally:
        sys.stdin = kept


def placed() -> dict[str, Any]:
    """A model whose weights are moved between two images."""
    model = components.Model(torch, replace(TINY, layout="channels_last"))
    model.load({})
    loop = sampling.Loop(model)
    before = loop(lambda: None).raw
    weights = list(model.components["unet"].parameters())
    places = [each.data_ptr() for each in weights]
    strides = [each.stride() for each in weights]
    kept = [each.data for each in weights]  # a place that is in use is not given again

    def moved(seconds: float) -> int:
        model.place_anew(random.Random(0), seconds)  # noqa: S311 (a sampling)
        return sum(each.data_ptr() != place for each, place in zip(weights, places, strict=True))

    found = {"all": len(weights), "in no time": moved(0.0), "moved": moved(math.inf)}
    model.case = replace(model.case, device="cuda:0")
    again = moved(math.inf)
    return found | {
        "of a card": again - found["moved"],
        "same": bool((loop(lambda: None).raw == before).all()),
        "strides": strides == [each.stride() for each in weights] and len(kept) == len(weights),
    }


def fits() -> dict[str, Any]:
    """The largest that fits into a memory that the test makes small, and into none."""
    model = components.Model(torch, replace(TINY_SD, dtype="fp32", batch=1))
    model.load({})
    free = device_memory.free_bytes
    found = {}
    try:
        for name, memory in (("some", 100 << 20), ("none", -1)):
            device_memory.free_bytes = functools.partial(int, memory)
            found[name] = plain(max_size.largest(model, math.inf))
    finally:
        device_memory.free_bytes = free
    found["no time"] = plain(max_size.largest(model, time.perf_counter()))
    compiled = components.Model(torch, replace(TINY_SD, compile="compiled"))
    found["compiled"] = plain(max_size.largest(compiled, math.inf))
    return found


def next_of(ahead: Iterator[float], _: object) -> float:
    """What the next call takes, by the test's own clock: it is not made."""
    return next(ahead)


def probed() -> dict[str, Any]:
    """The probe by a clock that the test owns: with a first call of 5 s, and with neighbours at every second call."""
    rates = {}
    for name, first in {"quiet": [], "slow start": [5.0], "neighbours": [5.0, 1.0, 2.0, 1.0]}.items():
        ahead = itertools.chain(first, itertools.cycle([0.001, 0.001, 1.0, 1.0] if len(first) > 1 else [0.001]))
        rates[name] = device_probe._rate(torch, "cpu", "fp32", functools.partial(next_of, ahead))
    torch.set_num_threads(2)
    two = device_probe.rate(torch, "cpu", "fp32")
    found = {"rates": rates, "threads kept": torch.get_num_threads(), "two": two}
    torch.set_num_threads(1)
    kernels = {name: device_probe.has_kernels(torch, "cpu", name) for name in ("fp32", "bf16", "fp16")}
    return found | {"one": device_probe.rate(torch, "cpu", "fp32"), "kernels": kernels}


def refused(*_: object) -> float:
    """A device without kernels for a dtype, or a machine without a compiler."""
    raise RuntimeError("not implemented for 'Half'\nand a trace")


def filled(*_: object) -> float:
    """A card whose memory a neighbour has."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def main() -> None:
    """Answer everything, as one line of JSON."""
    Processor().own()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    probe = probed()
    # The probe is real, and once for each dtype is enough.
    device_probe.rate = functools.cache(device_probe.rate)
    device_probe._ASK_SECONDS, device_probe._PROBE_SECONDS, device_probe._COPY_BYTES = 0.005, 0.002, 1 << 20
    found: dict[str, Any] = {"query": device_probe.query(torch), "probe": probe}
    found["cat"] = architecture(CAT)
    found["cat 256"] = architecture(replace(CAT, height=256, width=256))
    found["cat batch 3"] = architecture(replace(CAT, batch=3))
    found["sd"] = architecture(SD)
    whole = snapshot("whole", TINY, seed=0)
    other = snapshot("other", TINY, seed=1, variant="fp16")
    pickled = snapshot("pickled", TINY, seed=0, pickled=True)
    parts = snapshot("parts", TINY_SD, seed=0)
    found["tiny"] = measured(TINY, image="tiny.png")
    found["tiny again"] = measured(TINY)
    found["tiny seed 1"] = measured(replace(TINY, seed=1))
    found["tiny channels_last"] = measured(replace(TINY, layout="channels_last"))
    found["tiny ddpm"] = measured(replace(TINY, scheduler="ddpm"))
    found["tiny dpmpp-karras"] = measured(replace(TINY, scheduler="dpmpp-karras", batch=2))
    found["tiny-sd"] = measured(TINY_SD, image="sd.png")
    found["tiny-sd again"] = measured(TINY_SD)
    found["whole"] = measured(TINY, weights=whole)
    found["other"] = measured(TINY, weights=other)
    found["pickled"] = measured(TINY, weights=pickled)
    found["parts"] = measured(TINY_SD, weights=parts)
    found["tiny fp16"] = measured(replace(TINY_SD, dtype="fp16"))
    found["tiny sliced"] = measured(replace(TINY_SD, dtype="fp32", attention="sliced"))
    found["tf32"] = measured(replace(TINY, dtype="tf32"))
    found["wrong"] = with_patch(axes, "TOLERANCES", dict.fromkeys(axes.TOLERANCES, 1e-9), replace(TINY, dtype="bf16"))
    found["threads"] = measured(replace(TINY, threads=2))
    torch.set_num_threads(1)
    found["loops"] = loops()
    found["paced"] = paced()
    found["placed"] = placed()
    found["fits"] = fits()
    too_long = replace(CAT, steps=1000)
    found["too long"] = with_patch(device_probe, "rate", lambda *_: 1e10, too_long, limit_seconds=5.0)
    found["no dtype"] = with_patch(device_probe, "rate", refused, TINY)
    found["filled"] = with_patch(device_probe, "rate", filled, TINY)
    # A machine whose probe promises far too much: the first image tells, after two steps.
    clock, many = Ticking(0.01), replace(TINY, steps=1000)
    with patched(measurement, "time", clock), patched(cost, "time", clock):
        high = {"limit_seconds": 2.0, "asked_at": clock.now}
        found["overrated"] = with_patch(device_probe, "rate", lambda *_: 1e12, many, **high)
    # A probe that somebody disturbed; what the device did before is known.
    found["underrated"] = with_patch(device_probe, "rate", lambda *_: 1e3, TINY, rate_known=1e12)
    found["too few"] = with_patch(timing, "take", taken_once, TINY)
    with patched(compile_cost, "time", Ticking(31.0)):
        found["compiled"] = measured(replace(TINY, compile="compiled"), limit_seconds=30.0)
    found["no compiler"] = with_patch(torch, "compile", refused, replace(TINY, compile="compiled"))
    found["poisoned"] = with_patch(components.Model, "_fill", poisoned, TINY, image="nan.png")
    found["no memory"] = with_patch(components.Model, "_fill", out_of_memory, TINY)
    sys.stdout.write(json.dumps(found) + "\n")


@contextmanager
def patched(owner: Any, name: str, instead: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, instead)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def with_patch(owner: Any, name: str, instead: Any, case: Case, **rest: Any) -> Any:
    """A measurement with one thing replaced."""
    with patched(owner, name, instead):
        return measured(case, **rest)


main()
