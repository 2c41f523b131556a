"""What is said of a model that is in the cache, whole, in part, or harmed."""

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
    files = [ModelFile(path=path) for path in ("model_index.json", *paths)]
    return ModelSpec(repo="o/m", revision="1" * 40, variant=variant, license="mit", architecture="tiny-sd", files=files)


def place(snapshot: Path, *names: str, dtype: str = "F32") -> None:
    (snapshot / "unet").mkdir(parents=True, exist_ok=True)
    (snapshot / "model_index.json").write_text(json.dumps(INDEX))
    size = 8 if dtype == "F32" else 4
    for name in names:
        write(snapshot / "unet" / name, {"a": tensor(0, size, [2], dtype)}, bytes(size))


def read(snapshot: Path, entry: ModelSpec) -> PipelineStructure:
    """Also what the reports make of it: they end without a fault of their own."""
    found = pipeline_info.read(snapshot, entry, CHECKOUT / "envs")
    lines = models_output.structure_lines("m", entry, found, "load()")
    assert lines.encode()
    assert all(line.isprintable() for line in lines.split("\n"))
    assert json.loads(models_output.structure_json("m", entry, found, None))["faults"] == found.faults
    assert found.read_from == "the cache"
    return found


def unet(found: PipelineStructure) -> Component:
    return next(each for each in found.components if each.name == "unet")


def test_weights_of_another_variant_are_not_its_own(tmp_path: Path) -> None:
    place(tmp_path, HALF, dtype="F16")
    found = read(tmp_path, model(f"unet/{FULL}"))
    assert (unet(found).kind, unet(found).parameters, unet(found).bytes) == ("UNet2DModel", None, None)
    assert found.faults == ["unet: its fp32 weights are not here"]
    assert "amiss: unet: its fp32 weights are not here" in models_output.structure_lines("m", model(), found, None)
    half = read(tmp_path, model(f"unet/{HALF}", variant="fp16"))
    assert (unet(half).parameters, unet(half).dtype, half.faults) == (2, "fp16", [])
    place(tmp_path, FULL)
    assert (unet(read(tmp_path, model())).dtype, read(tmp_path, model()).faults) == ("fp32", [])
    (tmp_path / "unet" / HALF).unlink()
    assert read(tmp_path, model(variant="fp16")).faults == ["unet: its fp16 weights are not here"]


def test_weights_that_the_entry_names_are_its_own(tmp_path: Path) -> None:
    """A component that has no fp16 weights is taken in fp32 beside the others; and shards have longer names."""
    place(tmp_path, FULL)
    assert unet(read(tmp_path, model(f"unet/{FULL}", variant="fp16"))).dtype == "fp32"
    shards = [f"m.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    place(tmp_path, *shards, dtype="F16")
    found = read(tmp_path, model(*(f"unet/{name}" for name in shards), variant="fp16"))
    assert (unet(found).parameters, unet(found).dtype) == (4, "fp16")


def test_weights_that_are_not_here_at_all(tmp_path: Path) -> None:
    place(tmp_path)
    assert read(tmp_path, model(f"unet/{FULL}")).faults == ["unet: its fp32 weights are not here"]
    assert read(tmp_path, model()).faults == [], "nobody says that it has weights, as a tokenizer has none"


def test_a_model_that_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    write(tmp_path / HALF, {"a": tensor(0, 4, [2], "F16")}, bytes(4))
    found = read(tmp_path, model(HALF, variant="fp16"))
    assert [(each.name, each.kind, each.parameters) for each in found.components] == [("model", "AutoencoderKL", 2)]
    assert found.faults == []
    assert read(tmp_path, model(FULL)).faults == ["model: its fp32 weights are not here"]


def index(**changes: Any) -> str:
    return json.dumps(INDEX | changes)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (index(unet=["diffusers", {"a": 1}]), ["the class of unet in model_index.json is no name"]),
        (index(unet=["diffusers", 7]), ["the class of unet in model_index.json is no name"]),
        (index(unet=["diffusers", "\x1b[2J"]), ["the class of unet in model_index.json is no name"]),
        (index(unet=["diffusers", "\ud800"]), ["the class of unet in model_index.json is no name"]),
        (index(unet=[["x"], "Y"]), ["the library of unet in model_index.json is no name"]),
        (index(_class_name={"a": 1}), ["the pipeline in model_index.json is no name"]),
        (index(scheduler=["a", ["B"]]), ["the class of scheduler in model_index.json is no name"]),
        (index(**{"../../etc": ["a", "B"]}), ["model_index.json has '../../etc', which cannot be a component"]),
        (index(**{"": ["a", "B"]}), ["model_index.json has '', which cannot be a component"]),
        (index(**{"\x1b": ["a", "B"]}), ["model_index.json has '\\x1b', which cannot be a component"]),
        (index(safety_checker=[None, None], unet2=7, vae=[1], note="x", more={"a": "b"}), []),
        ("[" * 10**5, ["model_index.json cannot be read", "config.json cannot be read"]),
        ('{"a":' * 10**5, ["model_index.json cannot be read", "config.json cannot be read"]),
        ("[]", ["model_index.json cannot be read", "config.json cannot be read"]),
        ("\0", ["model_index.json cannot be read", "config.json cannot be read"]),
        ('{"a": ' + "9" * 5000 + "}", ["model_index.json cannot be read", "config.json cannot be read"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_an_odd_index_is_a_fault(tmp_path: Path, text: str, faults: list[str]) -> None:
    place(tmp_path, FULL)
    (tmp_path / "model_index.json").write_text(text)
    assert read(tmp_path, model()).faults == faults


def test_a_name_that_is_too_long_for_a_folder(tmp_path: Path) -> None:
    place(tmp_path, FULL)
    (tmp_path / "model_index.json").write_text(index(**{"a" * 300: ["a", "B"]}))
    found = read(tmp_path, model())
    assert "cannot be a component" in found.faults[0]
    assert unet(found).parameters == 2


@pytest.mark.parametrize(
    ("text", "kind", "faults"),
    [
        ('{"architectures": ["Clip"]}', "Clip", []),
        ('{"architectures": []}', None, []),
        ('{"architectures": {"a": 1}}', None, ["the class in config.json is no name"]),
        ('{"architectures": 5}', None, ["the class in config.json is no name"]),
        ('{"architectures": [["a"]]}', None, ["the class in config.json is no name"]),
        ('{"_class_name": ["X"]}', "X", []),
        ('{"_class_name": {"a": 1}}', None, ["the class in config.json is no name"]),
        ("3", None, ["config.json cannot be read"]),
    ],
)
def test_an_odd_configuration_is_a_fault(tmp_path: Path, text: str, kind: str | None, faults: list[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    found = read(tmp_path, model())
    assert (found.components[0].kind, found.faults) == (kind, faults)


@pytest.mark.parametrize(
    "text",
    [
        '{"b": 1, "a": "\\u001b[2J"}',
        '{"b": 1, "a": "\\ud800"}',
        '{"b": 1, "a\\u001b": 2}',
        '{"b": 1, "a": [[[[[1]]]]]}',
    ],
)
def test_settings_that_cannot_be_shown_are_left_out(tmp_path: Path, text: str) -> None:
    place(tmp_path, FULL)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(text)
    found = read(tmp_path, model())
    assert found.scheduler == ("DDPMScheduler", {"b": 1})
    assert found.faults == ["scheduler_config.json has settings that cannot be shown"]


def test_a_schedulers_settings(tmp_path: Path) -> None:
    place(tmp_path, FULL)
    settings = {"trained_betas": [0.1, 0.2], "clip": None, "steps": 1000, "kind": "linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(settings | {"_class_name": "DDPMScheduler"}))
    found = read(tmp_path, model())
    assert (found.scheduler, found.faults) == (("DDPMScheduler", settings), [])
