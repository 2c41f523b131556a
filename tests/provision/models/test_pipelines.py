"""Real diffusers on real small pipelines: what was pulled, or built as a stand-in, is loaded with the network off."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from provision.core import layout
from provision.core.errors import FirstlightError
from provision.core.layout import Root
from provision.models import architectures, manifest, pipeline_info, stand_in_worker, stand_ins
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from tests.provision import hub_server, tiny_pipelines
from tests.provision.http_server import Fault
from tests.provision.tiny_pipelines import ENVS, model

if TYPE_CHECKING:
    from pathlib import Path

# What a picture is: two steps of a pipeline from a seed, as a hash of its float pixels.
DRAW = """
import hashlib, json, sys
import numpy, torch, diffusers
def draw(where, **named):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(where, use_safetensors=True, dtype=torch.float32, **named)
    pipeline.set_progress_bar_config(disable=True)
    extra = {} if type(pipeline).__name__ == "DDPMPipeline" else dict(prompt="the cat", height=64, width=64)
    seed = torch.Generator().manual_seed(0)
    pixels = pipeline(num_inference_steps=2, generator=seed, output_type="np", **extra).images
    assert numpy.isfinite(pixels).all()
    return hashlib.sha256(numpy.ascontiguousarray(pixels).tobytes()).hexdigest()
print(json.dumps([draw(where, **named) for where, named in json.loads(sys.argv[1])]))
"""


def draw(python: Path, *asked: tuple[object, dict[str, object]], **environ: str) -> list[str]:
    argv = [str(python), "-c", DRAW, json.dumps([[str(where), named] for where, named in asked])]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=dict(os.environ) | environ)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def saved(measured_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_pipelines.save(measured_python, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def before(saved: dict[str, Path], measured_python: Path) -> list[str]:
    """The pictures of the pipelines as they were saved: sd, its fp16 variant, ddpm."""
    return draw(measured_python, (saved["sd"], {}), (saved["sd"], {"variant": "fp16"}), (saved["ddpm"], {}))


def sd_files(folder: Path, variant: str | None) -> dict[str, bytes]:
    every = hub_server.files_of(folder)
    return {
        path: content
        for path, content in every.items()
        if not path.endswith(".safetensors") or (".fp16." in path) == (variant is not None)
    }


@pytest.mark.parametrize("fault", [None, Fault("/resolve/", cut=100_000)])
def test_a_pulled_pipeline_draws_the_same_picture_offline(
    saved: dict[str, Path], before: list[str], measured_python: Path, root: Root, play: Any, fault: Fault | None
) -> None:
    """Bit for bit, through whatever the wire did."""
    entries = {
        "tiny-sd": ("owner/tiny-sd", sd_files(saved["sd"], None), None),
        "tiny-half": ("owner/tiny-half", sd_files(saved["sd"], "fp16"), "fp16"),
        "tiny-ddpm": ("owner/tiny-ddpm", hub_server.files_of(saved["ddpm"]), None),
    }
    played = hub_server.start(play, "owner/none", {}, *([fault] if fault else []))
    text = ""
    for name, (repo, files, variant) in entries.items():
        every = hub_server.files_of(saved["sd"]) if "ddpm" not in name else files
        hub_server.add(played, repo, every)
        text += hub_server.manifest_entry(name, repo, files, variant=variant)
    (root.path / "models.toml").write_text(text)
    known = manifest.load(root.path / "models.toml")
    for name in entries:
        work = Pull(root, name, known.pick(name), Hubs(root, {"HF_ENDPOINT": played.url}))
        work.run(work.plan(), lambda *_: None)
    played.close()
    named: dict[str, object] = {"cache_dir": str(root.hub)}
    half: dict[str, object] = {**named, "variant": "fp16"}
    drawn = draw(
        measured_python,
        ("owner/tiny-sd", named),
        ("owner/tiny-half", half),
        ("owner/tiny-ddpm", named),
        HF_HUB_OFFLINE="1",
    )
    assert drawn == before
    assert len(set(drawn)) == 3


def test_a_stand_in_draws_and_cannot_be_mistaken(measured_python: Path, root: Root) -> None:
    """Of an architecture that nobody has recorded."""
    snapshot = stand_ins.build(root, "tiny", model("tiny-sdxl"), ENVS, measured_python)
    assert snapshot.parent.parent.name == "models--stand-in--tiny"
    assert "NOT owner/x" in (snapshot / "README.md").read_text()
    again = Root(root.path / "again")
    again.hub.mkdir(parents=True)
    other = stand_ins.build(again, "tiny", model("tiny-sdxl"), ENVS, measured_python)
    assert other.name == snapshot.name, "the same seed makes the same bytes anywhere"
    named: dict[str, object] = {"cache_dir": str(root.hub)}
    one, two = draw(measured_python, ("stand-in/tiny", named), (other, {}), HF_HUB_OFFLINE="1")
    assert one == two
    assert not list(root.hub.glob(".firstlight-*"))


def test_what_show_says_of_a_stand_in_is_what_the_architecture_says(measured_python: Path, root: Root) -> None:
    built = model("tiny-sd", "fp16")
    told = pipeline_info.read(root.path, built, ENVS)
    snapshot = stand_ins.build(root, "tiny", built, ENVS, measured_python)
    read = pipeline_info.read(snapshot, built, ENVS)
    assert (told.read_from, read.read_from) == ("the architecture", "the cache")
    assert told.pipeline == read.pipeline == "StableDiffusionPipeline"
    assert told.scheduler is not None
    assert read.scheduler is not None
    assert told.scheduler[0] == read.scheduler[0] == "PNDMScheduler"
    one, two = (
        {each.name: (each.kind, each.parameters, each.dtype) for each in found.components} for found in (told, read)
    )
    assert one == two
    assert not read.faults


def test_every_architecture_has_the_parameters_that_it_tells(measured_python: Path) -> None:
    """Counted by the real classes on the meta device; and each model of the manifest has its architecture."""
    script = (
        "import json, sys, torch, diffusers, transformers\n"
        "from diffusers.pipelines import stable_diffusion\n"
        "def count(library, kind, config):\n"
        "    with torch.device('meta'):\n"
        "        if library == 'diffusers': made = getattr(diffusers, kind)(**config)\n"
        "        else:\n"
        "            cls = getattr({'transformers': transformers}.get(library, stable_diffusion), kind)\n"
        "            made = cls(cls.config_class(**config))\n"
        "    return sum(each.numel() for each in made.parameters())\n"
        "print(json.dumps([count(*row) for row in json.loads(sys.stdin.read())]))\n"
    )
    known = [architectures.load(ENVS, file.stem) for file in sorted((ENVS / "architectures").glob("*.json"))]
    rows = [(each.name, part, *each.classes[part], each.configs[part]) for each in known for part in each.classes]
    done = subprocess.run(
        [str(measured_python), "-I", "-c", script, stand_in_worker.__file__],
        input=json.dumps([row[2:] for row in rows]),
        capture_output=True,
        text=True,
        check=True,
    )
    counted = {row[:2]: count for row, count in zip(rows, json.loads(done.stdout), strict=True)}
    assert counted == {(each.name, part): count for each in known for part, count in each.parameters.items()}
    named = {each.architecture for each in manifest.load(ENVS / "models.toml").models.values()}
    assert named <= {each.name for each in known}


def test_shipped_records_say_what_the_real_classes_say(measured_python: Path) -> None:
    """Where this fails after a lock changed, run provision.models.record_architecture, as its docstring says."""
    names = sorted(file.stem for file in architectures.recorded(ENVS, "x").parent.glob("*.json"))
    assert {"ddpm-cat-256", "stable-diffusion-v1-5"} <= set(names), "the first setup builds these"
    known = {name: architectures.load(ENVS, name) for name in names}
    script = (
        "import json, runpy, sys; describe = runpy.run_path(sys.argv[1])['describe']\n"
        "print(json.dumps([describe(**each) for each in json.loads(sys.stdin.read())]))\n"
    )
    done = subprocess.run(
        [str(measured_python), "-I", "-c", script, stand_in_worker.__file__],
        input=json.dumps([each.request for each in known.values()]),
        capture_output=True,
        text=True,
        check=True,
    )
    told = dict(zip(names, json.loads(done.stdout), strict=True))
    assert {name: {**(each.description or {}), "diffusers": ""} for name, each in known.items()} == {
        name: {**each, "diffusers": ""} for name, each in told.items()
    }


def test_a_stand_in_that_cannot_be_built_says_why(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FirstlightError, match="is not there: a stand-in takes an environment"):
        stand_ins.build(root, "tiny", model("tiny-sdxl"), ENVS, layout.interpreter(tmp_path))
    with pytest.raises(FirstlightError, match="nothing is known of the architecture 'x'"):
        stand_ins.build(root, "tiny", model("x"), ENVS, layout.interpreter(tmp_path))
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho 'ModuleNotFoundError: diffusers' >&2; exit 1\n")
    bare.chmod(0o755)
    with pytest.raises(FirstlightError, match=r"could not be built by .*ModuleNotFoundError"):
        stand_ins.build(root, "tiny", model("tiny-sdxl"), ENVS, bare)
    assert [path.name for path in root.hub.iterdir()] == [".locks"], "nothing is left behind"
