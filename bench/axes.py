"""The axes of a case, by the names that suites and reports use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ENVS = [Path(__file__).resolve().parent.parent / place for place in ("envs", "provision/envs")]
ARCHITECTURES = next((envs for envs in _ENVS if envs.is_dir()), _ENVS[0]) / "architectures"
# The kinds of loops that are written here.
KINDS = {"unconditional", "text-to-image"}

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
    """Every architecture that has a loop here."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in ARCHITECTURES.glob("*.json")}
    return sorted(name for name, told in found.items() if told["kind"] in KINDS)
