"""The axes of a case, by the names that suites and reports use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ARCHITECTURES = Path(__file__).parent / "architectures"

# name -> torch's
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# name -> diffusers' class, and what is changed in the model's own scheduler configuration
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpmpp-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}

LAYOUTS = ("contiguous", "channels_last")

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")


def architecture(model: str) -> dict[str, Any]:
    """The configuration of a model's components."""
    return dict(json.loads((ARCHITECTURES / f"{model}.json").read_text(encoding="utf-8")))


def models() -> list[str]:
    """Every architecture that there is."""
    return sorted(file.stem for file in ARCHITECTURES.glob("*.json"))
