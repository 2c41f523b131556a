"""The axes of a case, by the names that suites and reports use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ENVS = [Path(__file__).resolve().parent.parent.parent / place for place in ("provision/envs", "envs")]
ARCHITECTURES = next((envs for envs in _ENVS if envs.is_dir()), _ENVS[-1]) / "architectures"

# What an architecture is -> what can be done with it, first what it was trained for.
TASKS: dict[str, tuple[str, ...]] = {
    "unconditional": ("unconditional",),
    "text-to-image": ("text-to-image", "image-to-image"),
    "text-to-image-xl": ("text-to-image", "image-to-image"),
    "inpainting": ("inpainting",),
    "controlnet": ("controlnet",),
}

# task -> diffusers' pipeline, and that of SDXL; "" where there is none
PIPELINES = {
    "text-to-image": ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "image-to-image": ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"),
    "inpainting": ("StableDiffusionInpaintPipeline", ""),
    "controlnet": ("StableDiffusionControlNetPipeline", ""),
}
# How much of an image's noise image-to-image starts from: diffusers' own default.
STRENGTH = 0.8

# name -> torch's. fp32 is IEEE's on every card; tf32 keeps fp32 in memory and computes with TF32 in convolutions and
# matrix products. What torch does by itself lies in between: TF32 in cuDNN's convolutions alone.
DTYPES = {"fp64": "float64", "fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# How far one evaluation may be from fp32's, relative L2. Measured on real architectures with random weights: bf16
# 1.0e-2, channels_last 1.8e-6, torch.compile 2.0e-6; fp16 and TF32 have 11 bits of mantissa, bf16 8. Five times that.
TOLERANCES = {"fp64": 1e-5, "fp32": 1e-5, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}

# name -> diffusers' class, and what is changed in the model's own scheduler configuration
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmpp": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp-2s": ("DPMSolverSinglestepScheduler", {}),
    "sa": ("SASolverScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}

LAYOUTS = ("contiguous", "channels_last")

# name -> torch's SDPBackend that is forced; None: torch chooses; eager and sliced are diffusers' own.
ATTENTIONS: dict[str, str | None] = {
    "sdpa": None,
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "eager": None,
    "sliced": None,
}

# name -> torch.compile's mode; None: it is not compiled
COMPILES: dict[str, str | None] = {
    "eager": None,
    "compiled": "default",
    "compiled-tuned": "max-autotune-no-cudagraphs",
    "compiled-graphs": "reduce-overhead",
}

OFFLOADS = ("none", "model", "sequential")
VAES = ("whole", "slicing", "tiling")
DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")


def architecture(model: str) -> dict[str, Any]:
    """The configuration of a model's components; one that extends another has that one's components too."""
    found: dict[str, Any] = json.loads((ARCHITECTURES / f"{model}.json").read_text(encoding="utf-8"))
    if "base" in found:
        base = architecture(found["base"])
        return base | found | {"classes": base["classes"] | found["classes"]}
    return found


def models() -> list[str]:
    """Every architecture that has a loop here."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in ARCHITECTURES.glob("*.json")}
    return sorted(name for name, told in found.items() if told["kind"] in TASKS)


def tasks(model: str) -> tuple[str, ...]:
    """What can be done with a model; the first is what it was trained for."""
    return TASKS[architecture(model)["kind"]]
