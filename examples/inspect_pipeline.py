"""Print the components of a pipeline, the settings of its scheduler, and the compatible schedulers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # with PYTHONSAFEPATH, Python does not add this folder

import host

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
arguments = parser.parse_args()
model = host.find(arguments.model)

import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16, **host.load_options(model))
print(pipeline)
print(pipeline.scheduler)
for class_name in sorted(scheduler_class.__name__ for scheduler_class in pipeline.scheduler.compatibles):
    print(class_name)
