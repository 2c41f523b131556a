"""Tests recipes, which are Python code for the fastest setting: the code is valid, and generates images."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench.core import axes
from bench.core.result import Case
from bench.run import recipe
from provision.config import toml
from provision.config.models import ModelFile, ModelSpec
from provision.core.layout import Root
from provision.models import stand_ins
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

ENVS = CHECKOUT / "envs"
MANIFEST = toml.load_tables(ENVS / "models.toml", ModelSpec)
PLAIN = Case("stable-diffusion-v1-5", "cuda:0", "fp16", "dpmpp-karras", 20, 1, 512, 512)
PREFERS_CUDNN = (
    "with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], "
    "set_priority=True):"
)


@pytest.mark.parametrize(("model", "task"), [(model, task) for model in axes.models() for task in axes.tasks(model)])
@pytest.mark.parametrize("attention", ["sdpa", "flash", "eager", "sliced"])
def test_recipe_is_valid_python_for_each_model_and_task(model: str, task: str, attention: str) -> None:
    case = replace(PLAIN, model=model, task=task, attention=attention, layout="channels_last", compile="compiled-tuned")
    text = recipe.code(case, MANIFEST)
    ast.parse(text)
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert "\n\n\n" not in text


def test_recipe_has_no_line_for_a_default_setting() -> None:
    text = recipe.code(PLAIN, MANIFEST)
    for word in ("compile", "channels_last", "sdpa", "tf32", "num_images", "offload", "threads", "tiling"):
        assert word not in text
    assert "variant=" not in text
    assert MANIFEST["stable-diffusion-v1-5"].revision in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dtype": "tf32"}, "torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True"),
        ({"dtype": "fp32"}, "torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False"),
        ({"compile": "compiled"}, "pipe.unet.forward = torch.compile(pipe.unet.forward)"),
        (
            {"compile": "compiled-graphs"},
            'pipe.unet.forward = torch.compile(pipe.unet.forward, mode="reduce-overhead")',
        ),
        ({"batch": 4}, "    num_images_per_prompt=4,"),
        ({"attention": "cudnn"}, PREFERS_CUDNN),
        ({"attention": "math"}, "with sdpa_kernel([SDPBackend.MATH]):"),
        ({"vae": "tiling"}, "pipe.vae.enable_tiling()"),
        ({"offload": "model"}, 'pipe.enable_model_cpu_offload(device="cuda:0")'),
        ({}, "pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)"),
        ({}, "    guidance_scale=7.5,"),
        ({"task": "image-to-image"}, "    strength=0.8,"),
        ({"model": "ddpm-cat-256", "steps": 7}, "scheduler.set_timesteps(7)"),
        (
            {"model": "ddpm-cat-256"},
            'image = torch.randn(1, 3, 512, 512, device="cuda:0", dtype=unet.dtype) * scheduler.init_noise_sigma',
        ),
        ({"threads": 2}, "torch.set_num_threads(2)"),
        ({"layout": "channels_last"}, "pipe.vae.to(memory_format=torch.channels_last)"),
    ],
)
def test_recipe_has_the_line_for_a_setting(changes: dict[str, object], line: str) -> None:
    assert line in recipe.code(replace(PLAIN, **changes), MANIFEST).splitlines()  # type: ignore[arg-type]


def test_recipe_passes_a_controlnet_to_the_pipeline_of_its_base_model() -> None:
    text = recipe.code(replace(PLAIN, model="sd-controlnet-canny"), MANIFEST)
    before, after = text.split("StableDiffusionControlNetPipeline.from_pretrained(")
    assert MANIFEST["sd-controlnet-canny"].repo in before
    assert MANIFEST["stable-diffusion-v1-5"].repo in after


def test_recipe_has_a_placeholder_for_a_model_that_is_not_in_the_manifest() -> None:
    text = recipe.code(replace(PLAIN, model="tiny-sd"), MANIFEST)
    assert '    "…",  # your model' in text


# (model, changed settings of its recipe)
RECIPES: tuple[tuple[str, dict[str, object]], ...] = (
    ("tiny-sd", {"layout": "channels_last", "attention": "eager", "batch": 2, "dtype": "bf16"}),
    ("tiny-sd", {"attention": "math", "vae": "slicing"}),
    ("tiny-ddpm", {"layout": "channels_last", "attention": "flash", "batch": 2, "dtype": "bf16"}),
)
# Runs each program of a JSON list with its own names, in one interpreter, so that torch is imported once. Prints a line
# for each: the number of its images, and whether all their values are finite.
RUN_RECIPES = """
import json, sys
for program in json.loads(sys.argv[1]):
    names = {"__name__": "__main__"}
    exec(program, names)
    import numpy
    print(len(names["images"]), numpy.isfinite(numpy.asarray(names["images"])).all())
"""


def build_stand_in(model: str, root: Root, python: Path) -> ModelSpec:
    """Build the stand-in of a model in a root, and return its manifest entry."""
    entry = ModelSpec(
        repo=f"stand-in/{model}",
        revision="1" * 40,
        license="mit",
        architecture=model,
        files=[ModelFile(path="model_index.json")],
    )
    snapshot = stand_ins.build(root, model, entry, ENVS, python)
    return entry.model_copy(update={"revision": snapshot.name})


@pytest.fixture(scope="module")
def recipes_run(measured_python: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Run the code of all RECIPES with stand-ins in the measured environment, without a network."""
    root = Root(tmp_path_factory.mktemp("recipes"))
    root.hub.mkdir(parents=True)
    manifest = {model: build_stand_in(model, root, measured_python) for model in ("tiny-sd", "tiny-ddpm")}
    programs = []
    for model, changes in RECIPES:
        case = Case(model, "cpu", "fp32", "euler", steps=2, batch=1, height=64, width=64)
        programs.append(recipe.code(replace(case, **changes), manifest))  # type: ignore[arg-type]
    argv = [str(measured_python), "-c", RUN_RECIPES, json.dumps(programs)]
    environ = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(root.hub)}
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=environ, cwd=root.path)


@pytest.mark.worker
@pytest.mark.parametrize("number", range(len(RECIPES)), ids=[f"{model} {changes}" for model, changes in RECIPES])
def test_recipe_generates_finite_images_with_a_stand_in(
    recipes_run: subprocess.CompletedProcess[str], number: int
) -> None:
    _, changes = RECIPES[number]
    lines = [line for line in recipes_run.stdout.splitlines() if line.endswith(("True", "False"))]
    assert lines[number : number + 1] == [f"{changes.get('batch', 1)} True"], recipes_run.stderr[-3000:]


@pytest.mark.worker
def test_recipes_cause_no_deprecation_warning(recipes_run: subprocess.CompletedProcess[str]) -> None:
    assert recipes_run.returncode == 0
    assert "torch_dtype` is deprecated" not in recipes_run.stderr
