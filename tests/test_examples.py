"""Tests the tutorial's code and the programs in `examples/` offline: with pulled models, a former id, and stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from provision.core.layout import Root
from provision.models import load_line, stand_ins
from tests.conftest import CHECKOUT, NOWHERE
from tests.provision import hub_server
from tests.provision.http_server import Server
from tests.provision.tiny_pipelines import ENVS, model

if TYPE_CHECKING:
    from pathlib import Path

SD, FORMER_ID, CAT = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
    "google/ddpm-cat-256",
)
# Files that the real Stable Diffusion repository also has. The manifest leaves them out; the model loads without them.
UNUSED_FILES = (
    "README.md",
    "v1-inference.yaml",
    "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
    "safety_checker/pytorch_model.bin",
)
# The code of the Hugging Face diffusers tutorial, on "cpu" instead of "cuda". Arguments: two repository ids, a folder.
TUTORIAL = """
import os, sys
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

sd, cat, folder = sys.argv[1:]
os.chdir(folder)

pipeline = DiffusionPipeline.from_pretrained(sd, torch_dtype=torch.float16)
pipeline.to("cpu")
image = pipeline("An image of a squirrel in Picasso style").images[0]
image.save("squirrel_picasso.png")

scheduler = DDPMScheduler.from_pretrained(cat)
model = UNet2DModel.from_pretrained(cat).to("cpu")
scheduler.set_timesteps(50)
sample_size = model.config.sample_size
sample = torch.randn((1, 3, sample_size, sample_size)).to("cpu")
for t in scheduler.timesteps:
    with torch.no_grad():
        residual = model(sample, t).sample
    sample = scheduler.step(residual, t, sample).prev_sample
from PIL import Image
image = (sample / 2 + 0.5).clamp(0, 1).squeeze()
image = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
Image.fromarray(image).save("cat.png")

print(pipeline)
print(pipeline.scheduler)
print(pipeline.scheduler.compatibles)
"""
# Evaluates lines of Python (first argument, JSON) with names of diffusers (second), and prints the type of each value.
EVALUATE_LINES = """
import json, sys
import diffusers, torch
names = {"torch": torch} | {name: getattr(diffusers, name) for name in json.loads(sys.argv[2])}
for line in json.loads(sys.argv[1]):
    print(type(eval(line, names)).__name__)
"""
# Runs several programs ([[file, argument, …], …] as JSON) in one interpreter, so that torch is imported once.
RUN_PROGRAMS = """
import json, runpy, sys
for program, *argv in json.loads(sys.argv[1]):
    sys.argv = [program, *argv]
    runpy.run_path(program, run_name="__main__")
"""


@pytest.fixture(scope="module")
def volume(measured_python: Path, saved_pipelines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Root:
    """Return a root with an environment, small pipelines pulled under the real repository ids, and two stand-ins."""
    base = tmp_path_factory.mktemp("tutorial")
    root = Root(base / "volume")
    root.hub.mkdir(parents=True)
    root.state.mkdir()
    root.marker.write_text(json.dumps({"schema": 1, "id": "x"}))
    (root.path / "envs").mkdir()
    root.prefix("diffusers").symlink_to(measured_python.parent.parent)
    files = hub_server.files_of(saved_pipelines["sd"])
    default = {path: content for path, content in files.items() if ".fp16." not in path}
    lean = {path: content for path, content in files.items() if path not in default or ".safetensors" not in path}
    lean = {path: content for path, content in lean.items() if not path.startswith("safety_checker/")}
    aliases = f'aliases = ["{FORMER_ID}"]\n'
    manifest = hub_server.manifest_entry("stable-diffusion-v1-5", SD, default, extra=aliases)
    manifest += hub_server.manifest_entry('"stable-diffusion-v1-5@fp16"', SD, lean, variant="fp16")
    cat_entry = hub_server.manifest_entry("ddpm-cat-256", CAT, hub_server.files_of(saved_pipelines["ddpm"]))
    (base / "models.toml").write_text(manifest + cat_entry.replace('"tiny-sd"', '"tiny-ddpm"'))
    (base / "host.toml").write_text(f'relocate = []\nmanifest = "{base / "models.toml"}"\n')
    hub = Server({})
    hub_server.add(hub, SD, files | dict.fromkeys(UNUSED_FILES, b"decoy"))
    hub_server.add(hub, CAT, hub_server.files_of(saved_pipelines["ddpm"]))
    (base / "empty home").mkdir()
    completed = provision(root, "pull", SD, CAT, HF_ENDPOINT=hub.url)
    hub.close()
    assert completed.returncode == 0, completed.stdout + completed.stderr
    for name, architecture in (("stable-diffusion-v1-5", "tiny-sd"), ("ddpm-cat-256", "tiny-ddpm")):
        stand_ins.build(root, name, model(architecture, checker=True), ENVS, measured_python)
    return root


def environ(root: Root, **more: str) -> dict[str, str]:
    """Return the environment variables: a home without a model cache, and an address at which no hub listens."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    # One thread: on a busy host, the threads of a small model wait for each other longer than they compute.
    own = {"HOME": str(root.path.parent / "empty home"), "HF_ENDPOINT": NOWHERE, "OMP_NUM_THREADS": "1"}
    return inherited | own | more


def provision(root: Root, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `provision models` with the words of `argv` and with this root."""
    words = [sys.executable, "-m", "provision", "models", *argv, "--host", str(root.path.parent / "host.toml")]
    # This home has no link to the model cache on the volume, so HF_HUB_CACHE names that folder.
    variables = environ(root, PYTHONPATH=str(CHECKOUT), HF_HUB_CACHE=str(root.hub)) | more
    return subprocess.run(
        [*words, "--root", str(root.path)], capture_output=True, text=True, check=False, env=variables
    )


def run(root: Root, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of the root's environment with the arguments `argv`."""
    words = [str(root.prefix("diffusers") / "bin/python"), *argv]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environ(root) | more)


def is_image(path: Path) -> bool:
    """Return whether an image has more than 16 colours; one that a safety checker blocks is black."""
    from PIL import Image

    with Image.open(path) as image:
        return len(set(image.convert("RGB").tobytes())) > 16


@pytest.mark.worker
def test_tutorial_code_makes_images_with_a_former_id_and_with_stand_ins(volume: Root, tmp_path: Path) -> None:
    """Run the same code twice; only the repository ids differ."""
    program = tmp_path / "tutorial.py"
    program.write_text(TUTORIAL)
    folders = [tmp_path / "pulled", tmp_path / "stand-in"]
    names = [(FORMER_ID, CAT), ("stand-in/stable-diffusion-v1-5", "stand-in/ddpm-cat-256")]
    for folder in folders:
        folder.mkdir()
    runs = [[str(program), *ids, str(folder)] for ids, folder in zip(names, folders, strict=True)]
    completed = run(volume, "-c", RUN_PROGRAMS, json.dumps(runs), HF_HUB_CACHE=str(volume.hub))
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert all(is_image(folder / name) for folder in folders for name in ("squirrel_picasso.png", "cat.png"))
    for word in ('"StableDiffusionSafetyChecker"', "CLIPImageProcessor", "PNDMScheduler {", "EulerDiscreteScheduler'"):
        assert completed.stdout.count(word) == 2, word


@pytest.mark.worker
def test_examples_make_images_and_say_that_those_of_stand_ins_are_noise(volume: Root, tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("squirrel.png", "cat.png", "noise.png", "noisy cat.png")]
    squirrel, cat, inspect_pipeline = (
        str(CHECKOUT / "examples" / f"{name}.py") for name in ("squirrel", "cat", "inspect_pipeline")
    )
    steps = ["--steps", "2", "--seed", "1", "--device", "cpu"]
    runs = [
        [squirrel, *steps, "--prompt", "a cat", str(images[0])],
        [cat, *steps, str(images[1])],
        [inspect_pipeline],
        [squirrel, *steps, "--model", "stand-in/stable-diffusion-v1-5", str(images[2])],
        [cat, *steps, "--model", "stand-in/ddpm-cat-256", str(images[3])],
        [inspect_pipeline, "--model", "stand-in/stable-diffusion-v1-5"],
    ]
    completed = run(volume, "-c", RUN_PROGRAMS, json.dumps(runs))
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert [is_image(image) for image in images] == [True] * 4
    pulled_output, _, stand_in_output = completed.stdout.partition("stand-in/stable-diffusion-v1-5 has random weights")
    assert "noise" not in pulled_output
    assert stand_in_output.count("the image is noise") == 3
    assert pulled_output.count("EulerDiscreteScheduler") == stand_in_output.count("EulerDiscreteScheduler") == 1


@pytest.mark.worker
def test_examples_load_fp16_files_or_a_stand_in_if_the_cache_has_nothing_else(
    volume: Root, saved_pipelines: dict[str, Path], tmp_path: Path
) -> None:
    """Set PYTHONSAFEPATH also, with which Python leaves the script's folder out of sys.path."""
    other_root = Root(tmp_path / "other")
    (other_root.hub / "models--owner--lean").mkdir(parents=True)
    snapshot = volume.hub / f"models--{SD.replace('/', '--')}" / "snapshots" / hub_server.REVISION
    fp16_snapshot = other_root.hub / "models--owner--lean/snapshots" / hub_server.REVISION
    for file in saved_pipelines["sd"].rglob("*"):
        path = file.relative_to(saved_pipelines["sd"])
        if (
            file.is_file()
            and path.parts[0] != "safety_checker"
            and (".safetensors" not in path.name or ".fp16." in path.name)
        ):
            (fp16_snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            (fp16_snapshot / path).write_bytes(file.read_bytes())
    (fp16_snapshot.parent.parent / "refs").mkdir()
    (fp16_snapshot.parent.parent / "refs/main").write_text(fp16_snapshot.name)
    stand_in = volume.hub / "models--stand-in--ddpm-cat-256"
    (other_root.hub / stand_in.name).symlink_to(stand_in)
    squirrel, cat = (str(CHECKOUT / "examples" / f"{name}.py") for name in ("squirrel", "cat"))
    runs = [
        [squirrel, "--steps", "1", "--device", "cpu", "--model", "owner/lean", str(tmp_path / "a.png")],
        [cat, "--steps", "1", "--device", "cpu", str(tmp_path / "b.png")],
    ]
    completed = run(volume, "-c", RUN_PROGRAMS, json.dumps(runs), HF_HUB_CACHE=str(other_root.hub), PYTHONSAFEPATH="1")
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert is_image(tmp_path / "a.png")
    assert f"in place of {CAT}: the image is noise" in completed.stdout
    assert snapshot.is_dir()


def test_example_without_its_model_prints_the_pull_command_and_exits_1(volume: Root, tmp_path: Path) -> None:
    for name in ("squirrel", "cat", "inspect_pipeline"):
        completed = run(
            volume, str(CHECKOUT / f"examples/{name}.py"), "--model", "owner/none", HF_HUB_CACHE=str(tmp_path)
        )
        assert (completed.returncode, completed.stdout) == (1, "")
        (line,) = completed.stderr.splitlines()
        assert line.startswith("owner/none is not in the cache. To download it: ")
        assert line.endswith(f" models pull owner/none --root {volume.path}")
    root_with_space = tmp_path / "a volume"
    (root_with_space / ".firstlight").mkdir(parents=True)
    (root_with_space / "envs").symlink_to(volume.path / "envs")
    (tmp_path / "none").mkdir()
    code = "import sys; sys.prefix = sys.argv[1]; sys.path.insert(0, sys.argv[2]); import host; host.find('owner/none')"
    words = [str(root_with_space / "envs/diffusers"), str(CHECKOUT / "examples")]
    completed = run(volume, "-c", code, *words, HF_HUB_CACHE=str(tmp_path / "none"))
    assert completed.stderr.strip().endswith(f"models pull owner/none --root '{root_with_space}'"), "the path is quoted"


def test_examples_find_a_stand_in_of_the_fp16_variant(volume: Root, tmp_path: Path) -> None:
    folder = tmp_path / "models--stand-in--ddpm-cat-256.fp16"
    snapshot = folder / "snapshots" / hub_server.REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(snapshot.name)
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT / 'examples')!r}); import host; print(host.find({CAT!r}))"
    completed = run(volume, "-c", code, HUGGINGFACE_HUB_CACHE=str(tmp_path))
    assert completed.stdout.splitlines()[-1:] == ["stand-in/ddpm-cat-256.fp16"], completed.stderr


@pytest.mark.worker
def test_load_line_of_models_show_loads_the_expected_class(volume: Root) -> None:
    """Evaluate the lines of a pipeline, a UNet, their stand-ins, and stand-ins of a ControlNet and an fp16 variant."""
    lines, class_names = [], []
    for name in ("stable-diffusion-v1-5", "ddpm-cat-256"):
        line_of_model = json.loads(provision(volume, "show", name, "--json").stdout)["load"]
        assert line_of_model in provision(volume, "show", name).stdout
        lines += [line_of_model, line_of_model.replace(line_of_model.split('"')[1], stand_ins.repo_of(name))]
    assert lines[0] == f'DiffusionPipeline.from_pretrained("{SD}", torch_dtype=torch.float16)'
    class_names += ["StableDiffusionPipeline"] * 2 + ["UNet2DModel"] * 2
    for entry, architecture, class_name in (
        ("control", "tiny-controlnet", "ControlNetModel"),
        ("half@fp16", "tiny-sd", "StableDiffusionPipeline"),
    ):
        stand_in_spec = model(architecture, "fp16" if "@" in entry else None)
        stand_ins.build(volume, entry, stand_in_spec, ENVS, volume.prefix("diffusers") / "bin/python")
        line = load_line.of_stand_in(entry, stand_in_spec, load_line.architecture_of(ENVS, stand_in_spec))
        assert line is not None
        lines.append(line)
        class_names.append(class_name)
    assert 'variant="fp16"' in lines[-1]
    assert "safety_checker=None" in lines[-1]
    classes = json.dumps(["DiffusionPipeline", "UNet2DModel", "ControlNetModel"])
    completed = run(volume, "-c", EVALUATE_LINES, json.dumps(lines), classes, HF_HUB_CACHE=str(volume.hub))
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert completed.stdout.split() == class_names
