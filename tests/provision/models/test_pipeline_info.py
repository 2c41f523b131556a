"""Tests the printed components of a model whose files are present, missing or damaged."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from provision.cli import models_output
from provision.config.models import ModelFile, ModelSpec
from provision.models import pipeline_info
from tests.conftest import CHECKOUT
from tests.provision.models.test_verify import tensor, write

if TYPE_CHECKING:
    from pathlib import Path

    from provision.models.pipeline_info import Component, PipelineStructure

INDEX = {"_class_name": "Pipe", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
HALF, FULL = "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"


def model(*paths: str, variant: str | None = None) -> ModelSpec:
    """Return an entry of the manifest with these files."""
    files = [ModelFile(path=path) for path in ("model_index.json", *paths)]
    return ModelSpec(repo="o/m", revision="1" * 40, variant=variant, license="mit", architecture="tiny-sd", files=files)


def save_pipeline(snapshot: Path, *names: str, dtype: str = "F32") -> None:
    """Write a pipeline with a UNet and these weights files into a snapshot."""
    (snapshot / "unet").mkdir(parents=True, exist_ok=True)
    (snapshot / "model_index.json").write_text(json.dumps(INDEX))
    size = 8 if dtype == "F32" else 4
    for name in names:
        write(snapshot / "unet" / name, {"a": tensor(0, size, [2], dtype)}, bytes(size))


def read(snapshot: Path, entry: ModelSpec) -> PipelineStructure:
    """Return the structure of a model in a snapshot; check that its text and its JSON can be printed."""
    structure = pipeline_info.read(snapshot, entry, CHECKOUT / "envs")
    lines = models_output.structure_lines("m", entry, structure, "load()")
    assert lines.encode()
    assert all(line.isprintable() for line in lines.split("\n"))
    assert json.loads(models_output.structure_json("m", entry, structure, None))["faults"] == structure.faults
    assert structure.read_from == "the cache"
    return structure


def unet(structure: PipelineStructure) -> Component:
    """Return the component named unet of a structure."""
    return next(component for component in structure.components if component.name == "unet")


def test_component_that_has_weights_of_another_variant_only_is_a_fault(tmp_path: Path) -> None:
    save_pipeline(tmp_path, HALF, dtype="F16")
    structure = read(tmp_path, model(f"unet/{FULL}"))
    assert (unet(structure).kind, unet(structure).parameters, unet(structure).bytes) == ("UNet2DModel", None, None)
    assert structure.faults == ["the fp32 weights of unet are missing"]
    assert "fault: the fp32 weights of unet are missing" in models_output.structure_lines("m", model(), structure, None)
    half = read(tmp_path, model(f"unet/{HALF}", variant="fp16"))
    assert (unet(half).parameters, unet(half).dtype, half.faults) == (2, "fp16", [])
    save_pipeline(tmp_path, FULL)
    assert (unet(read(tmp_path, model())).dtype, read(tmp_path, model()).faults) == ("fp32", [])
    (tmp_path / "unet" / HALF).unlink()
    assert read(tmp_path, model(variant="fp16")).faults == ["the fp16 weights of unet are missing"]


def test_weights_that_the_entry_lists_count_for_its_variant_whatever_their_file_name(tmp_path: Path) -> None:
    """Use an fp16 entry that lists fp32 weights, then an fp16 entry with weights in several files."""
    save_pipeline(tmp_path, FULL)
    assert unet(read(tmp_path, model(f"unet/{FULL}", variant="fp16"))).dtype == "fp32"
    shards = [f"m.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_pipeline(tmp_path, *shards, dtype="F16")
    structure = read(tmp_path, model(*(f"unet/{name}" for name in shards), variant="fp16"))
    assert (unet(structure).parameters, unet(structure).dtype) == (4, "fp16")


def test_missing_weights_are_a_fault_only_if_the_entry_lists_them(tmp_path: Path) -> None:
    save_pipeline(tmp_path)
    assert read(tmp_path, model(f"unet/{FULL}")).faults == ["the fp32 weights of unet are missing"]
    assert read(tmp_path, model()).faults == [], (
        "without a listed file, a component may have no weights, like a tokenizer"
    )


def test_model_that_is_no_pipeline_has_one_component_named_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    write(tmp_path / HALF, {"a": tensor(0, 4, [2], "F16")}, bytes(4))
    structure = read(tmp_path, model(HALF, variant="fp16"))
    assert [(component.name, component.kind, component.parameters) for component in structure.components] == [
        ("model", "AutoencoderKL", 2)
    ]
    assert structure.faults == []
    assert read(tmp_path, model(FULL)).faults == ["the fp32 weights of model are missing"]


def index(**changes: Any) -> str:
    """Return the text of model_index.json with changed keys."""
    return json.dumps(INDEX | changes)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (index(unet=["diffusers", {"a": 1}]), ["the class of unet in model_index.json is not a valid name"]),
        (index(unet=["diffusers", 7]), ["the class of unet in model_index.json is not a valid name"]),
        (index(unet=["diffusers", "\x1b[2J"]), ["the class of unet in model_index.json is not a valid name"]),
        (index(unet=["diffusers", "\ud800"]), ["the class of unet in model_index.json is not a valid name"]),
        (index(unet=[["x"], "Y"]), ["the library of unet in model_index.json is not a valid name"]),
        (index(_class_name={"a": 1}), ["the pipeline in model_index.json is not a valid name"]),
        (index(scheduler=["a", ["B"]]), ["the class of scheduler in model_index.json is not a valid name"]),
        (
            index(**{"../../etc": ["a", "B"]}),
            ["model_index.json has '../../etc', which is not a valid name of a component"],
        ),
        (index(**{"": ["a", "B"]}), ["model_index.json has '', which is not a valid name of a component"]),
        (index(**{"\x1b": ["a", "B"]}), ["model_index.json has '\\x1b', which is not a valid name of a component"]),
        (index(safety_checker=[None, None], unet2=7, vae=[1], note="x", more={"a": "b"}), []),
        ("[" * 10**5, ["model_index.json cannot be read", "config.json cannot be read"]),
        ('{"a":' * 10**5, ["model_index.json cannot be read", "config.json cannot be read"]),
        ("[]", ["model_index.json cannot be read", "config.json cannot be read"]),
        ("\0", ["model_index.json cannot be read", "config.json cannot be read"]),
        ('{"a": ' + "9" * 5000 + "}", ["model_index.json cannot be read", "config.json cannot be read"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_invalid_model_index_json_is_reported_as_a_fault(tmp_path: Path, text: str, faults: list[str]) -> None:
    save_pipeline(tmp_path, FULL)
    (tmp_path / "model_index.json").write_text(text)
    assert read(tmp_path, model()).faults == faults


def test_component_name_that_is_too_long_for_a_folder_is_reported_as_a_fault(tmp_path: Path) -> None:
    save_pipeline(tmp_path, FULL)
    (tmp_path / "model_index.json").write_text(index(**{"a" * 300: ["a", "B"]}))
    structure = read(tmp_path, model())
    assert "not a valid name of a component" in structure.faults[0]
    assert unet(structure).parameters == 2


@pytest.mark.parametrize(
    ("text", "kind", "faults"),
    [
        ('{"architectures": ["Clip"]}', "Clip", []),
        ('{"architectures": []}', None, []),
        ('{"architectures": {"a": 1}}', None, ["the class in config.json is not a valid name"]),
        ('{"architectures": 5}', None, ["the class in config.json is not a valid name"]),
        ('{"architectures": [["a"]]}', None, ["the class in config.json is not a valid name"]),
        ('{"_class_name": ["X"]}', "X", []),
        ('{"_class_name": {"a": 1}}', None, ["the class in config.json is not a valid name"]),
        ("3", None, ["config.json cannot be read"]),
    ],
)
def test_class_of_a_model_is_read_from_its_config_json_and_an_invalid_class_is_a_fault(
    tmp_path: Path, text: str, kind: str | None, faults: list[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    structure = read(tmp_path, model())
    assert (structure.components[0].kind, structure.faults) == (kind, faults)


@pytest.mark.parametrize(
    "text",
    [
        '{"b": 1, "a": "\\u001b[2J"}',
        '{"b": 1, "a": "\\ud800"}',
        '{"b": 1, "a\\u001b": 2}',
        '{"b": 1, "a": [[[[[1]]]]]}',
    ],
)
def test_scheduler_settings_that_cannot_be_printed_are_left_out_and_reported(tmp_path: Path, text: str) -> None:
    save_pipeline(tmp_path, FULL)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(text)
    structure = read(tmp_path, model())
    assert structure.scheduler == ("DDPMScheduler", {"b": 1})
    assert structure.faults == ["scheduler_config.json has settings that cannot be printed"]


def test_printable_scheduler_settings_are_read_from_scheduler_config_json(tmp_path: Path) -> None:
    save_pipeline(tmp_path, FULL)
    settings = {"trained_betas": [0.1, 0.2], "clip": None, "steps": 1000, "kind": "linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(settings | {"_class_name": "DDPMScheduler"}))
    structure = read(tmp_path, model())
    assert (structure.scheduler, structure.faults) == (("DDPMScheduler", settings), [])
