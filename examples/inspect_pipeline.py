"""Print what a pipeline is made of, its scheduler's settings, and the schedulers that may take its place."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import host

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
asked = parser.parse_args()
model = host.find(asked.model)

import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16, **host.files(model))
print(pipeline)
print(pipeline.scheduler)
for scheduler in sorted(each.__name__ for each in pipeline.scheduler.compatibles):
    print(scheduler)
