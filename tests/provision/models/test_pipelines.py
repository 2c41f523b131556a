"""Tests that real diffusers loads small pulled pipelines and stand-ins offline."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from provision.core import layout
from provision.core.errors import FirstlightError
from provision.core.layout import Root
from provision.models import architectures, describe_architecture, manifest, pipeline_info, stand_ins
from provision.models.hubs import Hubs
from provision.models.pull import Pull
from tests.provision import hub_server
from tests.provision.http_server import Fault
from tests.provision.tiny_pipelines import ENVS, model

if TYPE_CHECKING:
    from pathlib import Path

# Prints the hash of the float pixels of one image for each pipeline: two steps from a fixed seed.
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


def draw(python: Path, *pipelines: tuple[object, dict[str, object]], **environ: str) -> list[str]:
    """Return the hash of one image's pixels for each pipeline, given as (folder or id, from_pretrained arguments)."""
    argv = [str(python), "-c", DRAW, json.dumps([[str(model_id), options] for model_id, options in pipelines])]
    completed = subprocess.run(argv, capture_output=True, text=True, check=False, env=dict(os.environ) | environ)
    assert completed.returncode == 0, completed.stderr[-3000:]
    hashes: list[str] = json.loads(completed.stdout)
    return hashes


@pytest.fixture(scope="module")
def hashes_before(saved_pipelines: dict[str, Path], measured_python: Path) -> list[str]:
    """Return the image hashes of the saved pipelines before a pull: sd, the fp16 variant of sd, ddpm."""
    return draw(
        measured_python,
        (saved_pipelines["sd"], {}),
        (saved_pipelines["sd"], {"variant": "fp16"}),
        (saved_pipelines["ddpm"], {}),
    )


def sd_files(folder: Path, variant: str | None) -> dict[str, bytes]:
    """Return {relative path: content} of a saved pipeline with the weights of one variant (None: fp32)."""
    files = hub_server.files_of(folder)
    return {
        path: content
        for path, content in files.items()
        if not path.endswith(".safetensors") or (".fp16." in path) == (variant is not None)
    }


@pytest.mark.parametrize("fault", [None, Fault("/resolve/", cut=100_000)], ids=["no fault", "broken connections"])
def test_pulled_pipeline_makes_the_same_image_offline_as_before_the_pull(
    saved_pipelines: dict[str, Path],
    hashes_before: list[str],
    measured_python: Path,
    root: Root,
    serve: Any,
    fault: Fault | None,
) -> None:
    """Compare every pixel, with and without broken connections."""
    entries = {
        "tiny-sd": ("owner/tiny-sd", sd_files(saved_pipelines["sd"], None), None),
        "tiny-half": ("owner/tiny-half", sd_files(saved_pipelines["sd"], "fp16"), "fp16"),
        "tiny-ddpm": ("owner/tiny-ddpm", hub_server.files_of(saved_pipelines["ddpm"]), None),
    }
    server = hub_server.start(serve, "owner/none", {}, *([fault] if fault else []))
    text = ""
    for name, (repo, files, variant) in entries.items():
        repo_files = hub_server.files_of(saved_pipelines["sd"]) if "ddpm" not in name else files
        hub_server.add(server, repo, repo_files)
        text += hub_server.manifest_entry(name, repo, files, variant=variant)
    (root.path / "models.toml").write_text(text)
    models = manifest.load(root.path / "models.toml")
    for name in entries:
        pull = Pull(root, name, models.pick(name), Hubs(root, {"HF_ENDPOINT": server.url}))
        pull.run(pull.plan(), lambda *_: None)
    server.close()
    options: dict[str, object] = {"cache_dir": str(root.hub)}
    half: dict[str, object] = {**options, "variant": "fp16"}
    hashes = draw(
        measured_python,
        ("owner/tiny-sd", options),
        ("owner/tiny-half", half),
        ("owner/tiny-ddpm", options),
        HF_HUB_OFFLINE="1",
    )
    assert hashes == hashes_before
    assert len(set(hashes)) == 3


def test_stand_in_makes_an_image_offline_and_has_its_own_repository_id(measured_python: Path, root: Root) -> None:
    """Use an architecture without a recorded description, which the real environment describes."""
    snapshot = stand_ins.build(root, "tiny", model("tiny-sdxl"), ENVS, measured_python)
    assert snapshot.parent.parent.name == "models--stand-in--tiny"
    assert "NOT owner/x" in (snapshot / "README.md").read_text()
    other_root = Root(root.path / "again")
    other_root.hub.mkdir(parents=True)
    rebuilt = stand_ins.build(other_root, "tiny", model("tiny-sdxl"), ENVS, measured_python)
    assert rebuilt.name == snapshot.name, "the same seed gives the same bytes on every host"
    options: dict[str, object] = {"cache_dir": str(root.hub)}
    offline_image, rebuilt_image = draw(measured_python, ("stand-in/tiny", options), (rebuilt, {}), HF_HUB_OFFLINE="1")
    assert offline_image == rebuilt_image
    assert not list(root.hub.glob(".firstlight-*"))


def test_components_of_a_stand_in_equal_those_of_its_architecture(measured_python: Path, root: Root) -> None:
    entry = model("tiny-sd", "fp16")
    declared = pipeline_info.read(root.path, entry, ENVS)
    snapshot = stand_ins.build(root, "tiny", entry, ENVS, measured_python)
    built_structure = pipeline_info.read(snapshot, entry, ENVS)
    assert (declared.read_from, built_structure.read_from) == ("the architecture", "the cache")
    assert declared.pipeline == built_structure.pipeline == "StableDiffusionPipeline"
    assert declared.scheduler is not None
    assert built_structure.scheduler is not None
    assert declared.scheduler[0] == built_structure.scheduler[0] == "PNDMScheduler"
    declared_components, built_components = (
        {component.name: (component.kind, component.parameters, component.dtype) for component in structure.components}
        for structure in (declared, built_structure)
    )
    assert declared_components == built_components
    assert not built_structure.faults


def test_every_architecture_has_its_declared_number_of_parameters(measured_python: Path) -> None:
    """Count the parameters of the real classes on the meta device; each model must name a known architecture."""
    script = (
        "import json, sys, torch, diffusers, transformers\n"
        "from diffusers.pipelines import stable_diffusion\n"
        "def count(library, kind, config):\n"
        "    with torch.device('meta'):\n"
        "        if library == 'diffusers': model = getattr(diffusers, kind)(**config)\n"
        "        else:\n"
        "            cls = getattr({'transformers': transformers}.get(library, stable_diffusion), kind)\n"
        "            model = cls(cls.config_class(**config))\n"
        "    return sum(tensor.numel() for tensor in model.parameters())\n"
        "print(json.dumps([count(*row) for row in json.loads(sys.stdin.read())]))\n"
    )
    known_architectures = [
        architectures.load(ENVS, file.stem) for file in sorted((ENVS / "architectures").glob("*.json"))
    ]
    rows = [
        (architecture.name, part, *architecture.classes[part], architecture.configs[part])
        for architecture in known_architectures
        for part in architecture.classes
    ]
    completed = subprocess.run(
        [str(measured_python), "-I", "-c", script, describe_architecture.__file__],
        input=json.dumps([row[2:] for row in rows]),
        capture_output=True,
        text=True,
        check=True,
    )
    counted = {row[:2]: count for row, count in zip(rows, json.loads(completed.stdout), strict=True)}
    assert counted == {
        (architecture.name, part): count
        for architecture in known_architectures
        for part, count in architecture.parameters.items()
    }
    used = {architecture.architecture for architecture in manifest.load(ENVS / "models.toml").models.values()}
    assert used <= {architecture.name for architecture in known_architectures}


def test_shipped_descriptions_of_architectures_equal_those_of_the_real_classes(measured_python: Path) -> None:
    """Compare with a new description. After a change of a lock file, run provision.models.record_architecture."""
    names = sorted(file.stem for file in architectures.recorded_path(ENVS, "x").parent.glob("*.json"))
    assert {"ddpm-cat-256", "stable-diffusion-v1-5"} <= set(names), "the first setup builds these stand-ins"
    known_architectures = {name: architectures.load(ENVS, name) for name in names}
    script = (
        "import json, runpy, sys; describe = runpy.run_path(sys.argv[1])['describe']\n"
        "print(json.dumps([describe(**request) for request in json.loads(sys.stdin.read())]))\n"
    )
    completed = subprocess.run(
        [str(measured_python), "-I", "-c", script, describe_architecture.__file__],
        input=json.dumps([architecture.request for architecture in known_architectures.values()]),
        capture_output=True,
        text=True,
        check=True,
    )
    descriptions = dict(zip(names, json.loads(completed.stdout), strict=True))
    assert {
        name: {**(architecture.description or {}), "diffusers": ""}
        for name, architecture in known_architectures.items()
    } == {name: {**description, "diffusers": ""} for name, description in descriptions.items()}


def test_failed_build_of_a_stand_in_gives_the_reason(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        FirstlightError, match=r"does not exist\. This interpreter is needed to build a stand-in .*`make setup`"
    ):
        stand_ins.build(root, "tiny", model("tiny-sdxl"), ENVS, layout.interpreter(tmp_path))
    with pytest.raises(FirstlightError, match="the architecture 'x' is unknown"):
        stand_ins.build(root, "tiny", model("x"), ENVS, layout.interpreter(tmp_path))
    failing_python = tmp_path / "python"
    failing_python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: diffusers' >&2; exit 1\n")
    failing_python.chmod(0o755)
    with pytest.raises(FirstlightError, match=r"could not describe the architecture .*ModuleNotFoundError"):
        stand_ins.build(root, "tiny", model("tiny-sdxl"), ENVS, failing_python)
    assert [path.name for path in root.hub.iterdir()] == [".locks"], "no temporary file is left"
