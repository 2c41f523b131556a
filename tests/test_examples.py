"""The tutorial's programs as they are written, offline: on pulled repositories, by a former id, and on stand-ins."""

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
from tests.provision import hub_server, tiny_pipelines
from tests.provision.http_server import Played
from tests.provision.tiny_pipelines import ENVS, model

if TYPE_CHECKING:
    from pathlib import Path

SD, OLD, CAT = "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5", "google/ddpm-cat-256"
# What else the repository of Stable Diffusion has: the client knows of it from the listing, and must not miss it.
DECOYS = (
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
# The tutorial's code with "cuda" made "cpu" and little else: the names of the repositories come from outside.
LITERAL = """
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
# Each printed line, evaluated with nothing but torch and what diffusers exports.
LOAD = """
import json, sys
import diffusers, torch
names = {"torch": torch} | {name: getattr(diffusers, name) for name in json.loads(sys.argv[2])}
for line in json.loads(sys.argv[1]):
    print(type(eval(line, names)).__name__)
"""
# Several programs in one interpreter, as each would run by itself: one import of torch for them all.
ALL = """
import json, runpy, sys
for program, *argv in json.loads(sys.argv[1]):
    sys.argv = [program, *argv]
    runpy.run_path(program, run_name="__main__")
"""


@pytest.fixture(scope="module")
def volume(measured_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A root with an environment, with tiny pipelines pulled as the real repositories, and with two stand-ins."""
    base = tmp_path_factory.mktemp("tutorial")
    saved = tiny_pipelines.save(measured_python, base)
    root = Root(base / "volume")
    root.hub.mkdir(parents=True)
    root.state.mkdir()
    root.marker.write_text(json.dumps({"schema": 1, "id": "x"}))
    (root.path / "envs").mkdir()
    root.prefix("diffusers").symlink_to(measured_python.parent.parent)
    every = hub_server.files_of(saved["sd"])
    default = {path: content for path, content in every.items() if ".fp16." not in path}
    lean = {path: content for path, content in every.items() if path not in default or ".safetensors" not in path}
    lean = {path: content for path, content in lean.items() if not path.startswith("safety_checker/")}
    alias = f'aliases = ["{OLD}"]\n'
    text = hub_server.manifest_entry("stable-diffusion-v1-5", SD, default, extra=alias)
    text += hub_server.manifest_entry('"stable-diffusion-v1-5@fp16"', SD, lean, variant="fp16")
    cat = hub_server.manifest_entry("ddpm-cat-256", CAT, hub_server.files_of(saved["ddpm"]))
    (base / "models.toml").write_text(text + cat.replace('"tiny-sd"', '"tiny-ddpm"'))
    (base / "host.toml").write_text(f'relocate = []\nmanifest = "{base / "models.toml"}"\n')
    played = Played({})
    hub_server.add(played, SD, every | dict.fromkeys(DECOYS, b"decoy"))
    hub_server.add(played, CAT, hub_server.files_of(saved["ddpm"]))
    (base / "empty home").mkdir()
    done = provision(root, "pull", SD, CAT, HF_ENDPOINT=played.url)
    played.close()
    assert done.returncode == 0, done.stdout + done.stderr
    for name, architecture in (("stable-diffusion-v1-5", "tiny-sd"), ("ddpm-cat-256", "tiny-ddpm")):
        stand_ins.build(root, name, model(architecture, checker=True), ENVS, measured_python)
    return root


def environ(root: Root, **more: str) -> dict[str, str]:
    """A home without a cache, and a hub that does not answer."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    # One thread: those of a tiny model wait for each other longer than they compute where other programs run as well.
    told = {"HOME": str(root.path.parent / "empty home"), "HF_ENDPOINT": NOWHERE, "OMP_NUM_THREADS": "1"}
    return plain | told | more


def provision(root: Root, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "provision", "models", *argv, "--host", str(root.path.parent / "host.toml")]
    told = environ(root, PYTHONPATH=str(CHECKOUT)) | more
    return subprocess.run([*words, "--root", str(root.path)], capture_output=True, text=True, check=False, env=told)


def run(root: Root, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of the root's environment."""
    words = [str(root.prefix("diffusers") / "bin/python"), *argv]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environ(root) | more)


def is_drawn(path: Path) -> bool:
    """Return whether it is a picture, and not the black one that a safety checker leaves."""
    from PIL import Image

    with Image.open(path) as image:
        return len(set(image.convert("RGB").tobytes())) > 16


@pytest.mark.worker
def test_tutorial_runs_as_written(volume: Root, tmp_path: Path) -> None:
    """By the id before the repository moved, and on stand-ins with nothing but the names changed."""
    program = tmp_path / "tutorial.py"
    program.write_text(LITERAL)
    folders = [tmp_path / "pulled", tmp_path / "stand-in"]
    names = [(OLD, CAT), ("stand-in/stable-diffusion-v1-5", "stand-in/ddpm-cat-256")]
    for folder in folders:
        folder.mkdir()
    runs = [[str(program), *each, str(folder)] for each, folder in zip(names, folders, strict=True)]
    done = run(volume, "-c", ALL, json.dumps(runs), HF_HUB_CACHE=str(volume.hub))
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(is_drawn(folder / name) for folder in folders for name in ("squirrel_picasso.png", "cat.png"))
    for word in ('"StableDiffusionSafetyChecker"', "CLIPImageProcessor", "PNDMScheduler {", "EulerDiscreteScheduler'"):
        assert done.stdout.count(word) == 2, word


@pytest.mark.worker
def test_examples_draw_the_pulled_models_and_say_noise_of_stand_ins(volume: Root, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("squirrel.png", "cat.png", "noise.png", "noisy cat.png")]
    squirrel, cat, look = (
        str(CHECKOUT / "examples" / f"{name}.py") for name in ("squirrel", "cat", "inspect_pipeline")
    )
    steps = ["--steps", "2", "--seed", "1", "--device", "cpu"]
    runs = [
        [squirrel, *steps, "--prompt", "a cat", str(places[0])],
        [cat, *steps, str(places[1])],
        [look],
        [squirrel, *steps, "--model", "stand-in/stable-diffusion-v1-5", str(places[2])],
        [cat, *steps, "--model", "stand-in/ddpm-cat-256", str(places[3])],
        [look, "--model", "stand-in/stable-diffusion-v1-5"],
    ]
    done = run(volume, "-c", ALL, json.dumps(runs))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [is_drawn(place) for place in places] == [True] * 4
    first, _, second = done.stdout.partition("stand-in/stable-diffusion-v1-5 has random weights")
    assert "noise" not in first
    assert second.count("the picture is noise") == 3
    assert first.count("EulerDiscreteScheduler") == second.count("EulerDiscreteScheduler") == 1


@pytest.mark.worker
def test_example_takes_the_lean_files_or_the_stand_in_where_they_alone_are_here(volume: Root, tmp_path: Path) -> None:
    """And it needs no folder of the script on the path, which PYTHONSAFEPATH takes away."""
    other = Root(tmp_path / "other")
    (other.hub / "models--owner--lean").mkdir(parents=True)
    snapshot = volume.hub / f"models--{SD.replace('/', '--')}" / "snapshots" / hub_server.REVISION
    lean = other.hub / "models--owner--lean/snapshots" / hub_server.REVISION
    for file in (volume.path.parent / "sd").rglob("*"):
        path = file.relative_to(volume.path.parent / "sd")
        if (
            file.is_file()
            and path.parts[0] != "safety_checker"
            and (".safetensors" not in path.name or ".fp16." in path.name)
        ):
            (lean / path).parent.mkdir(parents=True, exist_ok=True)
            (lean / path).write_bytes(file.read_bytes())
    (lean.parent.parent / "refs").mkdir()
    (lean.parent.parent / "refs/main").write_text(lean.name)
    stand_in = volume.hub / "models--stand-in--ddpm-cat-256"
    (other.hub / stand_in.name).symlink_to(stand_in)
    squirrel, cat = (str(CHECKOUT / "examples" / f"{name}.py") for name in ("squirrel", "cat"))
    runs = [
        [squirrel, "--steps", "1", "--device", "cpu", "--model", "owner/lean", str(tmp_path / "a.png")],
        [cat, "--steps", "1", "--device", "cpu", str(tmp_path / "b.png")],
    ]
    done = run(volume, "-c", ALL, json.dumps(runs), HF_HUB_CACHE=str(other.hub), PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert is_drawn(tmp_path / "a.png")
    assert f"in place of {CAT}: the picture is noise" in done.stdout
    assert snapshot.is_dir()


def test_missing_model_is_one_line_with_the_command_that_pulls_it(volume: Root, tmp_path: Path) -> None:
    for name in ("squirrel", "cat", "inspect_pipeline"):
        done = run(volume, str(CHECKOUT / f"examples/{name}.py"), "--model", "owner/none", HF_HUB_CACHE=str(tmp_path))
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("owner/none is not here. To get it: ")
        assert line.endswith(f" models pull owner/none --root {volume.path}")
    spaced = tmp_path / "a volume"
    (spaced / ".firstlight").mkdir(parents=True)
    (spaced / "envs").symlink_to(volume.path / "envs")
    (tmp_path / "none").mkdir()
    code = "import sys; sys.prefix = sys.argv[1]; sys.path.insert(0, sys.argv[2]); import host; host.find('owner/none')"
    words = [str(spaced / "envs/diffusers"), str(CHECKOUT / "examples")]
    done = run(volume, "-c", code, *words, HF_HUB_CACHE=str(tmp_path / "none"))
    assert done.stderr.strip().endswith(f"models pull owner/none --root '{spaced}'"), "it can be pasted"


def test_a_stand_in_of_the_lean_files_is_found(volume: Root, tmp_path: Path) -> None:
    folder = tmp_path / "models--stand-in--ddpm-cat-256.fp16"
    snapshot = folder / "snapshots" / hub_server.REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(snapshot.name)
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT / 'examples')!r}); import host; print(host.find({CAT!r}))"
    done = run(volume, "-c", code, HUGGINGFACE_HUB_CACHE=str(tmp_path))
    assert done.stdout.splitlines()[-1:] == ["stand-in/ddpm-cat-256.fp16"], done.stderr


@pytest.mark.worker
def test_printed_line_loads_the_model(volume: Root) -> None:
    """Every kind: a pipeline, its variant, a UNet, a controlnet, a VAE; and the stand-ins."""
    lines, kinds = [], []
    for name in ("stable-diffusion-v1-5", "ddpm-cat-256"):
        shown = json.loads(provision(volume, "show", name, "--json").stdout)["load"]
        assert shown in provision(volume, "show", name).stdout
        lines += [shown, shown.replace(shown.split('"')[1], stand_ins.repo_of(name))]
    assert lines[0] == f'DiffusionPipeline.from_pretrained("{SD}", torch_dtype=torch.float16)'
    kinds += ["StableDiffusionPipeline"] * 2 + ["UNet2DModel"] * 2
    for entry, architecture, kind in (
        ("control", "tiny-controlnet", "ControlNetModel"),
        ("half@fp16", "tiny-sd", "StableDiffusionPipeline"),
    ):
        built = model(architecture, "fp16" if "@" in entry else None)
        stand_ins.build(volume, entry, built, ENVS, volume.prefix("diffusers") / "bin/python")
        line = load_line.of_stand_in(entry, built, load_line.architecture_of(ENVS, built))
        assert line is not None
        lines.append(line)
        kinds.append(kind)
    assert 'variant="fp16"' in lines[-1]
    assert "safety_checker=None" in lines[-1]
    classes = json.dumps(["DiffusionPipeline", "UNet2DModel", "ControlNetModel"])
    done = run(volume, "-c", LOAD, json.dumps(lines), classes, HF_HUB_CACHE=str(volume.hub))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == kinds
