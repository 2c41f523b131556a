"""The names of models: entries, variants, extras, former names and the ids of repositories; and what they hold."""

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
    ("asked", "name"),
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
def test_every_name_of_a_model_leads_to_its_entry(asked: str, name: str) -> None:
    assert SHIPPED.name(asked) == name
    assert SHIPPED.pick(asked) == SHIPPED.pick(name)
    assert SHIPPED.name(name) == name


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("x", "unknown model 'x'; there is: ddpm-cat-256"),
        ("x@fp16", "unknown model 'x@fp16'"),
        (f"{SD}@bf16", f"unknown variant of {SD} 'bf16'; there is: fp16"),
        (f"{SD}@", f"unknown variant of {SD} ''"),
        ("ddpm-cat-256@fp16", "unknown variant of ddpm-cat-256 'fp16'; there is: none"),
        (f"{SD}@fp16+x", f"unknown extra of {SD}@fp16 'x'; there is: safety-checker"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_name_is_an_error_that_lists_what_exists(asked: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"^{said}".replace("+", r"\+")):
        SHIPPED.pick(asked)


def test_repository_with_variants_alone_is_found_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(entry('"m@fp16"', 'variant = "fp16"'))
    known = manifest.load(tmp_path / "m.toml")
    assert [known.name(asked) for asked in ("m", "o/m", "m@fp16")] == ["m@fp16"] * 3


def test_own_entry_keeps_its_name_where_ours_has_it_as_a_former_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(entry(f"{SD}-fp32"))
    known = manifest.load(ENVS / "models.toml", str(tmp_path / "mine.toml"))
    assert known.pick(f"{SD}-fp32").repo == "o/m"


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ('"a+b"', "", "Rename it"),
        ('"a/b"', "", "Rename it"),
        ('"m@fp16"', "", 'takes variant = "fp16"'),
        ('"m@fp16"', 'variant = "bf16"', 'takes variant = "fp16"'),
        ("m", 'aliases = ["../x"]', "aliases"),
        ("m", 'aliases = ["a/b/c"]', "aliases"),
    ],
)
def test_name_that_cannot_be_asked_for_is_refused(tmp_path: Path, name: str, more: str, said: str) -> None:
    (tmp_path / "m.toml").write_text(entry(name, more))
    with pytest.raises(SpecError, match=said):
        manifest.load(tmp_path / "m.toml")


def entry(name: str, more: str = "") -> str:
    text = f'[{name}]\nrepo = "o/m"\nrevision = "{"1" * 40}"\nlicense = "mit"\narchitecture = "tiny-sd"\n{more}\n'
    return text + 'files = [{path = "model_index.json"}]\n'


@pytest.mark.parametrize("name", list(SHIPPED.models))
def test_entry_holds_one_file_of_weights_for_each_component_that_is_loaded(name: str) -> None:
    """Those that `from_pretrained` takes by the entry's variant, and no others."""
    model = SHIPPED.models[name]
    architecture = architectures.load(ENVS, model.architecture)
    wanted = set()
    for part in stand_ins.parts_of(model, architecture):
        stem = "diffusion_pytorch_model" if architecture.classes[part][0] == "diffusers" else "model"
        place = "" if architecture.is_flat else f"{part}/"
        wanted.add(f"{place}{stem}{f'.{model.variant}' if model.variant else ''}.safetensors")
        wanted.add(f"{place}config.json")
    paths = {file.path for file in model.files}
    assert {
        path for path in paths if path.endswith((".safetensors", "/config.json")) or path == "config.json"
    } == wanted
    folders = {*architecture.tokenizers, *architecture.processors} if architecture.pipeline else set()
    assert folders <= {path.partition("/")[0] for path in paths}
    if "@" not in name:
        assert architecture.beside <= stand_ins.parts_of(model, architecture), "from_pretrained(REPO) takes it as well"


def test_line_says_the_class_the_variant_and_what_is_left_out() -> None:
    shown = {
        name: load_line.line(model.repo, model, load_line.known(ENVS, model))
        for name in (*SHIPPED.models, f"{SD}@fp16+safety-checker")
        for model in (SHIPPED.pick(name),)
    }
    half = "torch_dtype=torch.float16"
    lean = f'DiffusionPipeline.from_pretrained("{SD}/{SD}", variant="fp16", {half}'
    xl = 'DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0"'
    assert shown == {
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


def test_model_of_an_unknown_architecture_has_a_line_where_it_is_a_pipeline() -> None:
    model = SHIPPED.pick(SD).model_copy(update={"architecture": "none"})
    assert load_line.known(ENVS, model) is None
    assert load_line.line("o/m", model, None) == 'DiffusionPipeline.from_pretrained("o/m", torch_dtype=torch.float16)'
    alone = model.model_copy(update={"files": [file for file in model.files if "index" not in file.path]})
    assert load_line.line("o/m", alone, None) is None
