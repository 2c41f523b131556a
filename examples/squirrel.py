"""Draw an image from a prompt with Stable Diffusion v1.5: the first program of the diffusers tutorial."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH, Python does not add this folder

import host

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="An image of a squirrel in Picasso style")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that is available")
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("output", nargs="?", default="squirrel_picasso.png")
arguments = parser.parse_args()
model = host.find(arguments.model)

import torch
from diffusers import DiffusionPipeline

device = host.device(arguments.device)
pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=host.dtype(device), **host.load_options(model))
pipeline.to(device)

generator = torch.Generator().manual_seed(arguments.seed)
image = pipeline(arguments.prompt, num_inference_steps=arguments.steps, generator=generator).images[0]
image.save(arguments.output)
print(arguments.output)
