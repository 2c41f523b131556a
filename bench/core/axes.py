"""Define the axes of a case (its settings, such as dtype and scheduler) and the names of their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ENVS = [Path(__file__).resolve().parent.parent.parent / folder for folder in ("provision/envs", "envs")]
ARCHITECTURES = next((envs for envs in _ENVS if envs.is_dir()), _ENVS[-1]) / "architectures"

# {kind of architecture: its tasks}; the first task is the one that models of this kind were trained for.
TASKS: dict[str, tuple[str, ...]] = {
    "unconditional": ("unconditional",),
    "text-to-image": ("text-to-image", "image-to-image"),
    "text-to-image-xl": ("text-to-image", "image-to-image"),
    "inpainting": ("inpainting",),
    "controlnet": ("controlnet",),
}

# {task: (the class of diffusers for Stable Diffusion, the class for SDXL)}; "": bench does not measure this task there.
PIPELINES = {
    "text-to-image": ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "image-to-image": ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"),
    "inpainting": ("StableDiffusionInpaintPipeline", ""),
    "controlnet": ("StableDiffusionControlNetPipeline", ""),
}
# `strength` of diffusers' image-to-image pipelines, the share of noise that is added to the input image: their default.
STRENGTH = 0.8

# {name: torch's dtype}. fp32 means IEEE fp32 on every device. tf32 stores fp32 and computes convolutions and matrix
# products in TF32. torch's default lies in between: TF32 in cuDNN's convolutions only.
DTYPES = {"fp64": "float64", "fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# {dtype: the largest allowed relative L2 distance between a model evaluation in this dtype and the same one in fp32}.
# The distances measured on real architectures with random weights are 1.0e-2 in bf16, and in fp32 1.8e-6 with
# channels_last and 2.0e-6 with torch.compile. A limit is five times the measured distance. The limits of fp16 and TF32
# are lower than that of bf16, since they have 11 bits of mantissa and bf16 has 8.
TOLERANCES = {"fp64": 1e-5, "fp32": 1e-5, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}

# {name: (diffusers' scheduler class, the values that replace those of the model's scheduler configuration)}
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

# {name: the SDPBackend that torch has to use}. None: torch chooses the backend for "sdpa"; "eager" and "sliced" are
# attention processors of diffusers that do not call torch's scaled_dot_product_attention.
ATTENTIONS: dict[str, str | None] = {
    "sdpa": None,
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "eager": None,
    "sliced": None,
}

# {name: the SDPBackends that torch may use, that of ATTENTIONS first}. The later ones compute the calls that the first
# one does not support. The efficient kernel supports each call that flash supports, so flash is in no other list.
PREFERRED_ATTENTIONS: dict[str, tuple[str, ...]] = {
    name: tuple(dict.fromkeys((backend, "EFFICIENT_ATTENTION", "MATH"))) if backend != "MATH" else (backend,)
    for name, backend in ATTENTIONS.items()
    if backend is not None
}

# {name: the `mode` argument of torch.compile}; None: the model is not compiled
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
    """Return the content of an architecture's JSON file: its kind, and the classes and settings of its components.

    A file with a "base" extends the file of that name: its own keys replace those of the base, and its `classes` are
    added.

    Raises:
        OSError: there is no file of this name.
    """
    config: dict[str, Any] = json.loads((ARCHITECTURES / f"{model}.json").read_text(encoding="utf-8"))
    if "base" in config:
        base = architecture(config["base"])
        return base | config | {"classes": base["classes"] | config["classes"]}
    return config


def models() -> list[str]:
    """Return the sorted names of the architectures that bench can measure: the files whose "kind" is a key of TASKS."""
    configs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in ARCHITECTURES.glob("*.json")}
    return sorted(name for name, config in configs.items() if config["kind"] in TASKS)


def tasks(model: str) -> tuple[str, ...]:
    """Return the tasks of an architecture; the first one is the task that the model was trained for."""
    return TASKS[architecture(model)["kind"]]
