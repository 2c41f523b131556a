"""Draw a cat with the denoising loop written out: a scheduler, a UNet, and noise."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import host

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", help="cuda, mps or cpu; the first of them that is there")
parser.add_argument("--model", default="google/ddpm-cat-256")
parser.add_argument("output", nargs="?", default="cat.png")
asked = parser.parse_args()
model = host.find(asked.model)

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

device = host.device(asked.device)
scheduler = DDPMScheduler.from_pretrained(model)
unet = UNet2DModel.from_pretrained(model).to(device)
scheduler.set_timesteps(asked.steps)

torch.manual_seed(asked.seed)
size = unet.config.sample_size
sample = torch.randn((1, 3, size, size)).to(device)
for number, t in enumerate(scheduler.timesteps, start=1):
    with torch.no_grad():
        residual = unet(sample, t).sample
    sample = scheduler.step(residual, t, sample).prev_sample
    print(f"\rstep {number} of {asked.steps}", end="", file=sys.stderr, flush=True)
print(file=sys.stderr)

pixels = (sample / 2 + 0.5).clamp(0, 1).squeeze()
pixels = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
Image.fromarray(pixels).save(asked.output)
print(asked.output)
