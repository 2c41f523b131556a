"""Measures a device with torch and diffusers only, without firstlight's code; runs under the measured interpreter.

Usage: bare_torch.py DEVICE UNET.json      prints one JSON object: products {dtype: FLOP/s}, step_seconds, torch
       bare_torch.py DEVICE load           computes until stdin is closed
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

_IMAGES = 4
_STEPS = 20
_BATCH = 8
_GROUPS = 6


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def mark(device: str) -> Any:
    """Return a point in time for `between`: on a GPU an event that is queued on its stream, else the host's clock.

    Queuing an event does not wait for the GPU.
    """
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, last: Any) -> float:
    """Return the seconds between two values of `mark`; the caller has synchronized the device after the second."""
    return float(last - first if isinstance(first, float) else first.elapsed_time(last) / 1000.0)


def product_rates(device: str) -> dict[str, float]:
    """Return {dtype: the highest FLOP/s of square matrix products over two sizes}."""
    is_card = device.startswith("cuda")
    dtypes = {"fp32": torch.float32}
    if is_card:  # many CPUs compute bf16 and fp16 only by emulation
        dtypes |= {"bf16": torch.bfloat16, "fp16": torch.float16}
    if is_card and torch.cuda.get_device_capability() >= (8, 0):
        dtypes["tf32"] = torch.float32
    rates: dict[str, float] = {}
    for name, dtype in dtypes.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        for edge in (8192, 4096) if is_card else (256, 512):
            matrix = torch.randn(edge, edge, device=device).to(dtype)
            calls = 5 if is_card else 1
            torch.mm(matrix, matrix)
            for _ in range(_GROUPS):
                synchronize(device)
                began = time.perf_counter()
                for _ in range(calls):
                    torch.mm(matrix, matrix)
                synchronize(device)
                rate = 2.0 * edge**3 * calls / (time.perf_counter() - began)
                rates[name] = max(rates.get(name, 0.0), rate)
    torch.backends.cuda.matmul.allow_tf32 = False
    return rates


def step_seconds(device: str, architecture: dict[str, Any]) -> float:
    """Return the median seconds of a denoising step with guidance: the UNet and the DDIM scheduler of diffusers."""
    config = architecture["unet"]
    from diffusers import DDIMScheduler, UNet2DConditionModel

    is_card = device.startswith("cuda")
    kind = torch.float16 if is_card else torch.float32
    with torch.device(device):
        unet = UNet2DConditionModel(**config).to(kind).eval()
    edge = (512 if is_card else 64) // architecture["scale"]
    scheduler = DDIMScheduler()
    states = torch.randn(2 * _BATCH, 77, config["cross_attention_dim"], device=device, dtype=kind)
    noise = torch.randn(_BATCH, 4, edge, edge, device=device, dtype=kind)
    seconds: list[float] = []
    with torch.no_grad():
        for image in range(_IMAGES):
            latents = noise
            scheduler.set_timesteps(_STEPS, device=device)
            marks = [mark(device)]
            for step in scheduler.timesteps:
                both = scheduler.scale_model_input(torch.cat([latents] * 2), step)
                without, with_prompt = unet(both, step, encoder_hidden_states=states).sample.chunk(2)
                guided = without + 7.5 * (with_prompt - without)
                latents = scheduler.step(guided, step, latents).prev_sample
                marks.append(mark(device))
            synchronize(device)
            if image:  # the first image is not counted: in it, libraries choose their kernels
                seconds += [between(first, last) for first, last in itertools.pairwise(marks)]
    return statistics.median(seconds)


def compute_until_closed(device: str) -> None:
    """Multiply matrices until stdin is closed, as another process on the device; print "computing" first."""
    is_closed = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        is_closed.set()

    threading.Thread(target=wait, daemon=True).start()
    matrix = torch.randn(2048, 2048, device=device)
    torch.mm(matrix, matrix)
    synchronize(device)
    print("computing", flush=True)
    while not is_closed.is_set():
        torch.mm(matrix, matrix)
        synchronize(device)


def main() -> None:
    """Measure the device and print the result; with the argument `load`, compute until stdin is closed."""
    device, what = sys.argv[1:]
    if not device.startswith("cuda"):
        torch.set_num_threads(1)  # with other programs on the host, several threads mostly wait for each other
    if what == "load":
        compute_until_closed(device)
        return
    architecture = json.loads(Path(what).read_text(encoding="utf-8"))
    answer = {"products": product_rates(device), "step_seconds": step_seconds(device, architecture)}
    print(json.dumps(answer | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
