"""Draw a picture from a prompt with Stable Diffusion v1.5: the first program of the diffusers tutorial."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import host

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="An image of a squirrel in Picasso style")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", help="cuda, mps or cpu; the first of them that is there")
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("output", nargs="?", default="squirrel_picasso.png")
asked = parser.parse_args()
model = host.find(asked.model)

import torch
from diffusers import DiffusionPipeline

device = host.device(asked.device)
pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=host.dtype(device), **host.files(model))
pipeline.to(device)

generator = torch.Generator().manual_seed(asked.seed)
image = pipeline(asked.prompt, num_inference_steps=asked.steps, generator=generator).images[0]
image.save(asked.output)
print(asked.output)
