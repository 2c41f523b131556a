"""Draw a cat with an explicit denoising loop: a scheduler, a UNet, and noise."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH, Python does not add this folder

import host

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that is available")
parser.add_argument("--model", default="google/ddpm-cat-256")
parser.add_argument("output", nargs="?", default="cat.png")
arguments = parser.parse_args()
model = host.find(arguments.model)

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

device = host.device(arguments.device)
scheduler = DDPMScheduler.from_pretrained(model)
unet = UNet2DModel.from_pretrained(model).to(device)
scheduler.set_timesteps(arguments.steps)

torch.manual_seed(arguments.seed)
size = unet.config.sample_size
sample = torch.randn((1, 3, size, size)).to(device)
for step, timestep in enumerate(scheduler.timesteps, start=1):
    with torch.no_grad():
        residual = unet(sample, timestep).sample
    sample = scheduler.step(residual, timestep, sample).prev_sample
    print(f"\rstep {step} of {arguments.steps}", end="", file=sys.stderr, flush=True)
print(file=sys.stderr)

pixels = (sample / 2 + 0.5).clamp(0, 1).squeeze()
pixels = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
Image.fromarray(pixels).save(arguments.output)
print(arguments.output)
