"""What test_worker.py asks of real torch and diffusers, in one process: importing them takes longer than all of it."""

from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import probes, sampling, worker
from bench.result import Case, plain

TINY = Case("tiny-ddpm", "cpu", "fp32", "ddim", steps=4, batch=1, height=16, width=16)
TINY_SD = Case("tiny-sd", "cpu", "bf16", "dpmpp-karras", steps=3, batch=2, height=64, width=64)
CAT = Case("ddpm-cat-256", "cpu", "fp32", "ddpm", steps=50, batch=1, height=64, width=64)
SD = Case("stable-diffusion-v1-5", "cpu", "fp32", "dpmpp-karras", steps=20, batch=1, height=512, width=512)
FOLDER = Path(sys.argv[1])
FILL = sampling.Model._fill


def measured(case: Case, *, limit_seconds: float = 600.0, weights: Path | None = None, image: str | None = None) -> Any:
    """One case, with the shortest number of samples; its result as plain JSON, with what was said on the way."""
    path = str(FOLDER / image) if image else None
    request = worker.Request(case, time.time(), 0.0, limit_seconds, str(weights) if weights else None, path)
    said: list[dict[str, Any]] = []
    result = plain(worker.measure(request, said.append))
    return {"result": result, "said": said}


def architecture(case: Case) -> Any:
    """The size of a model and the arithmetic of one step, all of it on the meta device."""
    model = sampling.Model(torch, case)
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
    model = sampling.Model(torch, replace(case, seed=seed))
    model.load(None)
    for part, component in model.components.items():
        place = folder if case.model == "tiny-ddpm" else folder / part
        component.save_pretrained(place, safe_serialization=True, variant=variant)
    if pickled:
        for file in folder.glob("*.safetensors"):
            torch.save(model.components["unet"].state_dict(), file.with_suffix(".bin"))
            file.unlink()
    return folder


def poisoned(self: sampling.Model, component: Any) -> Any:
    """Random weights, one of which is no number."""
    component = FILL(self, component)
    next(component.parameters()).view(-1)[0] = float("nan")
    return component


def out_of_memory(self: sampling.Model, component: Any) -> Any:
    """What torch's CPU allocator says, on a request that no machine can meet."""
    torch.empty(1 << 60)
    return component


def refused(torch: Any, device: str, dtype: str) -> float:
    """A device without kernels for a dtype."""
    raise RuntimeError("not implemented for 'Half'\nand a trace")


def main() -> None:
    """Answer everything, as one line of JSON."""
    # Two threads that wait for each other on a busy machine turn milliseconds into seconds.
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    # The probe is real, and once for each dtype is enough.
    probes.rate = functools.cache(probes.rate)
    found: dict[str, Any] = {"query": probes.query(torch)}
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
    found["too long"] = measured(replace(CAT, steps=1000), limit_seconds=5.0)
    found["no dtype"] = with_patch(probes, "rate", refused, TINY)
    # A machine whose probe promises far too much: the first image tells, after two steps.
    found["overrated"] = with_patch(probes, "rate", lambda *_: 1e18, replace(TINY, steps=1000), limit_seconds=2.0)
    found["poisoned"] = with_patch(sampling.Model, "_fill", poisoned, TINY, image="nan.png")
    found["no memory"] = with_patch(sampling.Model, "_fill", out_of_memory, TINY)
    sys.stdout.write(json.dumps(found) + "\n")


def with_patch(owner: Any, name: str, instead: Any, case: Case, **rest: Any) -> Any:
    """A measurement with one thing replaced."""
    kept = getattr(owner, name)
    setattr(owner, name, instead)
    try:
        return measured(case, **rest)
    finally:
        setattr(owner, name, kept)


main()
