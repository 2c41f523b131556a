"""Define the axes of a case, with the value names that suites and reports use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ENVS = [Path(__file__).resolve().parent.parent.parent / folder for folder in ("provision/envs", "envs")]
ARCHITECTURES = next((envs for envs in _ENVS if envs.is_dir()), _ENVS[-1]) / "architectures"

# {kind of architecture: its tasks}; the first task is the one that it was trained for.
TASKS: dict[str, tuple[str, ...]] = {
    "unconditional": ("unconditional",),
    "text-to-image": ("text-to-image", "image-to-image"),
    "text-to-image-xl": ("text-to-image", "image-to-image"),
    "inpainting": ("inpainting",),
    "controlnet": ("controlnet",),
}

# {task: (diffusers' pipeline class, the SDXL class)}; "" where there is none.
PIPELINES = {
    "text-to-image": ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "image-to-image": ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"),
    "inpainting": ("StableDiffusionInpaintPipeline", ""),
    "controlnet": ("StableDiffusionControlNetPipeline", ""),
}
# The share of the noise that image-to-image adds to its input image: diffusers' default.
STRENGTH = 0.8

# {name: torch's dtype}. fp32 means IEEE fp32 on every device. tf32 stores fp32 and computes convolutions and matrix
# products in TF32. torch's default lies in between: TF32 in cuDNN's convolutions only.
DTYPES = {"fp64": "float64", "fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# {dtype: the largest relative L2 distance of one evaluation from the same in fp32}. Measured on real architectures with
# random weights: bf16 1.0e-2, channels_last 1.8e-6, torch.compile 2.0e-6. The limit is five times as much. fp16 and
# TF32 have 11 bits of mantissa, bf16 has 8.
TOLERANCES = {"fp64": 1e-5, "fp32": 1e-5, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}

# {name: (diffusers' class, changes to the model's own scheduler configuration)}
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

# {name: the forced SDPBackend of torch}; None: torch chooses. eager and sliced are implementations of diffusers.
ATTENTIONS: dict[str, str | None] = {
    "sdpa": None,
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "eager": None,
    "sliced": None,
}

# {name: the SDPBackends that torch may use, the forced one first}: the later ones compute the calls that the first one
# does not take. Each call that flash takes is one that the efficient kernel takes too, so flash is in no other list.
PREFERRED_ATTENTIONS: dict[str, tuple[str, ...]] = {
    name: tuple(dict.fromkeys((backend, "EFFICIENT_ATTENTION", "MATH"))) if backend != "MATH" else (backend,)
    for name, backend in ATTENTIONS.items()
    if backend is not None
}

# {name: the mode of torch.compile}; None: not compiled
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
    """Return the configuration of an architecture's components; a file with a "base" extends that architecture.

    Raises:
        OSError: no file has this architecture.
    """
    config: dict[str, Any] = json.loads((ARCHITECTURES / f"{model}.json").read_text(encoding="utf-8"))
    if "base" in config:
        base = architecture(config["base"])
        return base | config | {"classes": base["classes"] | config["classes"]}
    return config


def models() -> list[str]:
    """Return the sorted names of all architectures of a kind that bench can sample from."""
    configs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in ARCHITECTURES.glob("*.json")}
    return sorted(name for name, config in configs.items() if config["kind"] in TASKS)


def tasks(model: str) -> tuple[str, ...]:
    """Return the tasks of an architecture; the first is the one it was trained for."""
    return TASKS[architecture(model)["kind"]]
