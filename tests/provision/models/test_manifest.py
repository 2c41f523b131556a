"""Tests the names of models (entries, variants, extras, former names, repository ids) and the shipped manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from provision.core.errors import SpecError
from provision.models import architectures, load_line, manifest, stand_ins
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

ENVS = CHECKOUT / "envs"
SHIPPED = manifest.load(ENVS / "models.toml")
SD = "stable-diffusion-v1-5"


@pytest.mark.parametrize(
    ("requested", "name"),
    [
        (SD, SD),
        (f"{SD}/{SD}", SD),
        (f"runwayml/{SD}", SD),
        (f"{SD}-fp32", SD),
        (f"{SD}+safety-checker", SD),
        (f"{SD}-fp32+safety-checker", SD),
        (f"{SD}@fp16", f"{SD}@fp16"),
        (f"{SD}/{SD}@fp16", f"{SD}@fp16"),
        (f"runwayml/{SD}@fp16+safety-checker", f"{SD}@fp16+safety-checker"),
        (f"{SD}@fp16+safety-checker+safety-checker", f"{SD}@fp16+safety-checker"),
        ("google/ddpm-cat-256", "ddpm-cat-256"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl"),
        ("stable-diffusion-inpainting@fp16", "stable-diffusion-inpainting"),
        ("stable-diffusion-inpainting+safety-checker", "stable-diffusion-inpainting"),
        ("lllyasviel/sd-controlnet-canny", "sd-controlnet-canny"),
    ],
)
def test_every_name_of_a_model_selects_its_manifest_entry(requested: str, name: str) -> None:
    assert SHIPPED.name(requested) == name
    assert SHIPPED.pick(requested) == SHIPPED.pick(name)
    assert SHIPPED.name(name) == name


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("x", "unknown model 'x'; available: ddpm-cat-256"),
        ("x@fp16", "unknown model 'x@fp16'"),
        (f"{SD}@bf16", f"unknown variant of {SD} 'bf16'; available: fp16"),
        (f"{SD}@", f"unknown variant of {SD} ''"),
        ("ddpm-cat-256@fp16", "unknown variant of ddpm-cat-256 'fp16'; available: none"),
        (f"{SD}@fp16+x", f"unknown extra of {SD}@fp16 'x'; available: safety-checker"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_model_variant_or_extra_is_rejected_with_the_available_names(requested: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"^{message}".replace("+", r"\+")):
        SHIPPED.pick(requested)


def test_model_with_a_variant_entry_only_is_found_by_its_plain_name_and_repository_id(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(entry('"m@fp16"', 'variant = "fp16"'))
    models = manifest.load(tmp_path / "m.toml")
    assert [models.name(requested) for requested in ("m", "o/m", "m@fp16")] == ["m@fp16"] * 3


def test_name_of_a_users_entry_goes_before_the_former_name_of_a_shipped_model(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(entry(f"{SD}-fp32"))
    models = manifest.load(ENVS / "models.toml", str(tmp_path / "mine.toml"))
    assert models.pick(f"{SD}-fp32").repo == "o/m"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ('"a+b"', "", "Rename the entry"),
        ('"a/b"', "", "Rename the entry"),
        ('"m@fp16"', "", 'requires the line variant = "fp16"'),
        ('"m@fp16"', 'variant = "bf16"', 'requires the line variant = "fp16"'),
        ("m", 'aliases = ["../x"]', "aliases"),
        ("m", 'aliases = ["a/b/c"]', "aliases"),
    ],
)
def test_manifest_entry_with_an_invalid_name_or_alias_is_refused(
    tmp_path: Path, name: str, more: str, message: str
) -> None:
    (tmp_path / "m.toml").write_text(entry(name, more))
    with pytest.raises(SpecError, match=message):
        manifest.load(tmp_path / "m.toml")


def entry(name: str, more: str = "") -> str:
    """Return a manifest entry with one file as TOML; `more` is a further line of the entry."""
    text = f'[{name}]\nrepo = "o/m"\nrevision = "{"1" * 40}"\nlicense = "mit"\narchitecture = "tiny-sd"\n{more}\n'
    return text + 'files = [{path = "model_index.json"}]\n'


@pytest.mark.parametrize("name", list(SHIPPED.models))
def test_shipped_manifest_entry_has_one_weights_file_for_each_loaded_component(name: str) -> None:
    """Compare the entry's files with those that `from_pretrained` loads for the entry's variant."""
    model = SHIPPED.models[name]
    architecture = architectures.load(ENVS, model.architecture)
    expected = set()
    for component in stand_ins.parts_of(model, architecture):
        stem = "diffusion_pytorch_model" if architecture.classes[component][0] == "diffusers" else "model"
        prefix = "" if architecture.is_flat else f"{component}/"
        expected.add(f"{prefix}{stem}{f'.{model.variant}' if model.variant else ''}.safetensors")
        expected.add(f"{prefix}config.json")
    paths = {file.path for file in model.files}
    assert {
        path for path in paths if path.endswith((".safetensors", "/config.json")) or path == "config.json"
    } == expected
    folders = {*architecture.tokenizers, *architecture.processors} if architecture.pipeline else set()
    assert folders <= {path.partition("/")[0] for path in paths}
    if "@" not in name:
        assert architecture.optional <= stand_ins.parts_of(model, architecture), (
            "from_pretrained(REPO) loads the optional components, too"
        )


def test_python_line_that_loads_a_shipped_model_has_its_class_variant_and_omitted_parts() -> None:
    lines = {
        name: load_line.line(model.repo, model, load_line.architecture_of(ENVS, model))
        for name in (*SHIPPED.models, f"{SD}@fp16+safety-checker")
        for model in (SHIPPED.pick(name),)
    }
    half = "torch_dtype=torch.float16"
    lean = f'DiffusionPipeline.from_pretrained("{SD}/{SD}", variant="fp16", {half}'
    xl = 'DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0"'
    assert lines == {
        "ddpm-cat-256": 'UNet2DModel.from_pretrained("google/ddpm-cat-256")',
        SD: f'DiffusionPipeline.from_pretrained("{SD}/{SD}", {half})',
        f"{SD}@fp16": f"{lean}, safety_checker=None)",
        f"{SD}@fp16+safety-checker": f"{lean})",
        "stable-diffusion-inpainting": (
            f'DiffusionPipeline.from_pretrained("{SD}/stable-diffusion-inpainting", variant="fp16", {half})'
        ),
        "sd-controlnet-canny": f'ControlNetModel.from_pretrained("lllyasviel/sd-controlnet-canny", {half})',
        "stable-diffusion-xl": f"{xl}, {half})",
        "stable-diffusion-xl@fp16": f'{xl}, variant="fp16", {half})',
        "sdxl-vae-fp16-fix": f'AutoencoderKL.from_pretrained("madebyollin/sdxl-vae-fp16-fix", {half})',
    }


def test_python_line_that_loads_a_model_of_an_unknown_architecture_exists_for_pipelines_only() -> None:
    model = SHIPPED.pick(SD).model_copy(update={"architecture": "none"})
    assert load_line.architecture_of(ENVS, model) is None
    assert load_line.line("o/m", model, None) == 'DiffusionPipeline.from_pretrained("o/m", torch_dtype=torch.float16)'
    without_index = model.model_copy(update={"files": [file for file in model.files if "index" not in file.path]})
    assert load_line.line("o/m", without_index, None) is None
