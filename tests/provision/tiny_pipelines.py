"""Saves real pipelines of tiny architectures with diffusers, with the files that their repositories have."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from provision.config.models import ModelFile, ModelSpec
from provision.core.layout import Root
from provision.models import stand_ins
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

ENVS = CHECKOUT / "envs"
REVISION = "1" * 40
# The added noise makes weights that fp16 must round, so that the fp32 and fp16 variants give different images.
SAVE = """
import sys
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
sd, cat, out_sd, out_cat = sys.argv[1:]
torch.manual_seed(0)
pipeline = DiffusionPipeline.from_pretrained(sd, torch_dtype=torch.float32)
with torch.no_grad():
    for weight in pipeline.unet.parameters():
        weight.add_(0.01 * torch.randn_like(weight))
pipeline.save_pretrained(out_sd)
pipeline.to(dtype=torch.float16).save_pretrained(out_sd, variant="fp16")
unet = UNet2DModel.from_pretrained(cat)
with torch.no_grad():
    for weight in unet.parameters():
        weight.add_(0.01 * torch.randn_like(weight))
unet.save_pretrained(out_cat)
DDPMScheduler.from_pretrained(cat).save_pretrained(out_cat)
"""


def model(architecture: str, variant: str | None = None, *, checker: bool = False) -> ModelSpec:
    files = [ModelFile(path=path) for path in ("model_index.json", *(["safety_checker/config.json"] * checker))]
    return ModelSpec(
        repo="owner/x", revision=REVISION, variant=variant, license="mit", architecture=architecture, files=files
    )


def save(python: Path, base: Path) -> dict[str, Path]:
    """Save two pipelines, and return {name: folder}.

    "sd" has two variants and a safety checker, and "ddpm" has its files in one folder, as in their repositories.
    """
    root = Root(base / "root")
    root.hub.mkdir(parents=True)
    sd = stand_ins.build(root, "tiny-sd", model("tiny-sd", checker=True), ENVS, python)
    ddpm = stand_ins.build(root, "tiny-ddpm", model("tiny-ddpm"), ENVS, python)
    folders = {"sd": base / "sd", "ddpm": base / "ddpm"}
    argv = [str(python), "-c", SAVE, str(sd), str(ddpm), *map(str, folders.values())]
    completed = subprocess.run(argv, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert completed.returncode == 0, completed.stderr[-3000:]
    (folders["ddpm"] / "model_index.json").write_bytes((ddpm / "model_index.json").read_bytes())
    return folders
