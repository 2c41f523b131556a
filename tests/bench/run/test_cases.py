"""Tests suites: the shipped ones, the suite files of users, and the search for the weights of their cases."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bench.core.axes import DTYPES, SCHEDULERS, architecture, models
from bench.run import cases
from provision.config import models as models_config
from provision.config import toml
from provision.core import layout
from provision.core.errors import SpecError

if TYPE_CHECKING:
    from pathlib import Path

SUITE = """\
description = "two blocks"

[budget]
cpu = 10
cuda = 20
mps = 30

[[matrix]]
model = "tiny-sd"
dtype = ["fp32", "bf16"]
scheduler = ["ddim", "ddpm"]
cpu = {size = 64, steps = 2}
gpu = {size = 128, steps = 9, batch = 4}

[[matrix]]
model = "tiny-ddpm"
dtype = ["fp16"]
scheduler = ["dpmpp-karras"]
layout = ["contiguous", "channels_last"]
cpu = {size = 16, steps = 3}
gpu = {size = 32, steps = 7}
"""
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def suite(tmp_path: Path) -> cases.Suite:
    return cases.load_suite(str(write_suite(tmp_path, SUITE)))


def write_suite(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", cases.suites())
@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
def test_shipped_suite_has_valid_cases_with_different_names_on_each_device(name: str, device: str) -> None:
    suite = cases.load_suite(name)
    cells = cases.unroll(suite, device)
    assert suite.description
    assert {cell.case.device for cell in cells} == {device}
    assert len({cell.case.name for cell in cells}) == len(cells), (
        "two cases have the same name, which is also the picture's file name"
    )
    for case in (cell.case for cell in cells):
        assert case.scheduler in SCHEDULERS
        assert case.dtype in DTYPES
        assert case.height % architecture(case.model)["scale"] == 0


def test_shipped_suites_have_the_names_that_the_makefile_uses() -> None:
    assert {"quick", "tiny", "sampling", "schedulers", "precision", "memory", "pipelines", "full"} == set(
        cases.suites()
    )


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_full_suite_has_the_cases_of_all_other_suites_but_tiny(device: str) -> None:
    whole = {cell.case for cell in cases.unroll(cases.load_suite("full"), device)}
    for name in set(cases.suites()) - {"full", "tiny"}:
        assert {cell.case for cell in cases.unroll(cases.load_suite(name), device)} <= whole


def test_schedulers_suite_has_a_case_for_each_scheduler() -> None:
    for device in ("cpu", "cuda:0"):
        cells = cases.unroll(cases.load_suite("schedulers"), device)
        assert {cell.case.scheduler for cell in cells} == set(SCHEDULERS)


def test_suite_file_that_includes_itself_or_has_no_case_is_rejected(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    budget = "[budget]\ncpu = 1\ncuda = 1\nmps = 1\n"
    mine.write_text(f'description = "a cycle"\ninclude = "{mine}"\n{budget}')
    with pytest.raises(SpecError, match="includes itself"):
        cases.load_suite(str(mine))
    mine.write_text(f'description = "nothing"\n{budget}')
    with pytest.raises(SpecError, match="has no cases"):
        cases.load_suite(str(mine))


def test_axis_of_a_suite_file_is_one_value_or_a_list_of_values(tmp_path: Path) -> None:
    text = SUITE.replace('"tiny-sd"', '["tiny-sd", "tiny-sdxl"]').replace("steps = 2", "steps = [2, 4], batch = [1, 2]")
    text = text.replace('["fp32", "bf16"]', '"bf16"').replace('["ddim", "ddpm"]', '"ddim"')
    cells = cases.unroll(cases.load_suite(str(write_suite(tmp_path, text))), "cpu")
    assert [(cell.case.model, cell.case.steps, cell.case.batch) for cell in cells[:8]] == [
        (name, steps, batch) for name in ("tiny-sd", "tiny-sdxl") for steps in (2, 4) for batch in (1, 2)
    ]


def test_matrix_block_without_a_shape_for_the_device_has_no_cases_there(tmp_path: Path) -> None:
    text = SUITE.replace("gpu = {size = 128, steps = 9, batch = 4}\n", "find_max = true\n")
    suite = cases.load_suite(str(write_suite(tmp_path, text)))
    assert {cell.case.model for cell in cases.unroll(suite, "cuda:0")} == {"tiny-ddpm"}
    assert {cell.case.model: cell.find_max for cell in cases.unroll(suite, "cpu")} == {
        "tiny-sd": True,
        "tiny-ddpm": False,
    }


def test_case_is_changed_by_values_of_axes_given_as_text(suite: cases.Suite) -> None:
    case = cases.unroll(suite, "cpu")[0].case
    changed = cases.change(case, {"dtype": "bf16", "size": "128", "steps": "7", "layout": "channels_last"})
    assert changed == replace(case, dtype="bf16", height=128, width=128, steps=7, layout="channels_last")
    assert cases.change(case, {}) == case
    assert cases.change(case, {"task": "image-to-image"}).task == "image-to-image"
    assert cases.unroll(suite, "cpu", changes={"threads": "3"})[0].case.threads == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp8"}, "dtype=fp8: unknown dtype 'fp8'; valid names: fp64, fp32"),
        ({"colour": "red"}, "unknown axis 'colour'; available: attention, batch"),
        ({"size": "7"}, "size=7: Input should be a multiple of 8"),
        ({"task": "inpainting"}, "tiny-sd has no task inpainting. Choose one of: text-to-image, image-to-image"),
    ],
)
def test_unknown_axis_or_invalid_value_is_rejected(suite: cases.Suite, changes: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        cases.change(cases.unroll(suite, "cpu")[0].case, changes)
    assert message in str(caught.value)


def test_cases_have_the_order_of_the_suite_file(suite: cases.Suite) -> None:
    cells = cases.unroll(suite, "cpu")
    assert [(cell.case.model, cell.case.dtype, cell.case.scheduler, cell.case.layout) for cell in cells] == [
        ("tiny-sd", "fp32", "ddim", "contiguous"),
        ("tiny-sd", "fp32", "ddpm", "contiguous"),
        ("tiny-sd", "bf16", "ddim", "contiguous"),
        ("tiny-sd", "bf16", "ddpm", "contiguous"),
        ("tiny-ddpm", "fp16", "dpmpp-karras", "contiguous"),
        ("tiny-ddpm", "fp16", "dpmpp-karras", "channels_last"),
    ]


def test_cases_of_a_suite_have_different_names(suite: cases.Suite) -> None:
    # The name of a case is also the file name of its picture.
    names = [cell.case.name for cell in cases.unroll(suite, "cpu")]
    assert len(set(names)) == len(names), names


@pytest.mark.parametrize(
    ("device", "shape"), [("cpu", (64, 64, 2, 1)), ("cuda:3", (128, 128, 9, 4)), ("mps", (128, 128, 9, 4))]
)
def test_case_has_the_shape_for_its_kind_of_device(suite: cases.Suite, device: str, shape: tuple[int, ...]) -> None:
    first = cases.unroll(suite, device)[0].case
    assert (first.height, first.width, first.steps, first.batch) == shape
    assert first.device == device


@pytest.mark.parametrize(
    ("only_models", "only_dtypes", "expected"),
    [
        (["tiny-sd"], [], [("tiny-sd", "fp32"), ("tiny-sd", "fp32"), ("tiny-sd", "bf16"), ("tiny-sd", "bf16")]),
        ([], ["fp16"], [("tiny-ddpm", "fp16"), ("tiny-ddpm", "fp16")]),
        (["tiny-sd", "tiny-ddpm"], ["bf16"], [("tiny-sd", "bf16"), ("tiny-sd", "bf16")]),
    ],
)
def test_selection_of_models_and_dtypes_leaves_only_their_cases(
    suite: cases.Suite, only_models: list[str], only_dtypes: list[str], expected: list[tuple[str, str]]
) -> None:
    cells = cases.unroll(suite, "cpu", only_models=only_models, only_dtypes=only_dtypes)
    assert [(cell.case.model, cell.case.dtype) for cell in cells] == expected


def test_selection_that_leaves_no_case_is_rejected(suite: cases.Suite) -> None:
    with pytest.raises(SpecError, match="no case"):
        cases.unroll(suite, "cpu", only_models=["tiny-sd"], only_dtypes=["fp16"])


def test_unknown_suite_is_rejected_with_the_names_of_all_suites() -> None:
    with pytest.raises(SpecError) as caught:
        cases.load_suite("quikc")
    assert "'quikc'" in str(caught.value)
    for name in cases.suites():
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("only_models", "only_dtypes", "unknown", "listed"),
    [(["dalle"], [], "model 'dalle'", models()), ([], ["fp8"], "dtype 'fp8'", list(DTYPES))],
)
def test_selection_of_an_unknown_model_or_dtype_is_rejected_with_the_valid_names(
    suite: cases.Suite, only_models: list[str], only_dtypes: list[str], unknown: str, listed: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        cases.unroll(suite, "cpu", only_models=only_models, only_dtypes=only_dtypes)
    assert unknown in str(caught.value)
    for name in listed:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "line", "fragments"),
    [
        ("batch = 4", "batsh = 4", 13, ["matrix.0.gpu.0.batsh", "unknown key", "batch"]),
        ('description = "two blocks"', 'descripton = "two"', 1, ["description"]),
        ("cuda = 20", 'cuda = "twenty"', 5, ["budget.cuda", "integer"]),
        ("mps = 30", "mps = 0", 6, ["budget.mps", "greater than 0"]),
        ('["fp32", "bf16"]', '["fp32", "fp8"]', 10, ["matrix.0.dtype.1", "'fp8'", "fp32, tf32, bf16, fp16"]),
        ('"tiny-sd"', '"tiny-dit"', 9, ["matrix.0.model", "'tiny-dit'", "tiny-sd", "ddpm-cat-256"]),
        ('["dpmpp-karras"]', '["eular"]', 18, ["matrix.1.scheduler.0", "'eular'", "dpmpp-karras"]),
        ('"channels_last"]', '"rows"]', 19, ["matrix.1.layout.1", "'rows'", "channels_last"]),
        ('dtype = ["fp16"]', "dtype = []", 17, ["matrix.1.dtype", "at least 1"]),
        ("size = 16", "size = 20", 20, ["matrix.1.cpu.0.size", "multiple of 8"]),
        ("steps = 7", "steps = 0", 21, ["matrix.1.gpu.0.steps"]),
    ],
)
def test_invalid_value_in_a_suite_file_is_rejected_with_file_line_and_key(
    tmp_path: Path, old: str, new: str, line: int, fragments: list[str]
) -> None:
    assert SUITE.count(old) == 1
    file = write_suite(tmp_path, SUITE.replace(old, new))
    with pytest.raises(SpecError) as caught:
        cases.load_suite(str(file))
    message = str(caught.value)
    assert message.startswith(f"{file}, line {line}, key ")
    for fragment in fragments:
        assert fragment in message


def test_absent_or_malformed_suite_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not exist"):
        cases.load_suite(str(tmp_path / "absent.toml"))
    with pytest.raises(SpecError, match="not valid TOML"):
        cases.load_suite(str(write_suite(tmp_path, "description = \n")))


def model(files: dict[str, int | None], architecture: str = "tiny-sd") -> models_config.ModelSpec:
    """Return a manifest entry with these files: {path: size in bytes, or None}."""
    return models_config.ModelSpec(
        repo="someone/model",
        revision=REVISION,
        license="mit",
        architecture=architecture,
        files=[models_config.ModelFile(path=path, size=size) for path, size in files.items()],
    )


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """Return a snapshot folder as huggingface_hub makes it, with a link to a blob of 5 bytes."""
    folder = tmp_path / "cache" / "huggingface" / "hub" / "models--someone--model" / "snapshots" / REVISION
    (folder / "unet").mkdir(parents=True)
    blob = folder.parent.parent / "blob"
    blob.write_bytes(b"12345")
    (folder / "unet" / "model.safetensors").symlink_to(blob)
    (folder / "config.json").write_bytes(b"{}")
    return folder


def test_weights_of_a_model_are_the_complete_snapshot_of_its_architecture(tmp_path: Path, snapshot: Path) -> None:
    manifest = {
        "other": model({"config.json": 2}, architecture="tiny-ddpm"),
        "mine": model({"unet/model.safetensors": 5, "config.json": None}),
    }
    root = layout.Root(tmp_path)
    assert cases.weights("tiny-sd", manifest, root) == {"tiny-sd": str(snapshot)}
    assert cases.weights("ddpm-cat-256", manifest, root) == {}


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": 2, "vae/model.safetensors": None},
        {"config.json": 2, "unet/model.safetensors": 6},
        {"config.json": 0, "unet/model.safetensors": 5},
    ],
    ids=["a file is absent", "a file is cut short", "a file is longer"],
)
def test_incomplete_snapshot_is_not_used(tmp_path: Path, snapshot: Path, files: dict[str, int | None]) -> None:
    assert cases.weights("tiny-sd", {"mine": model(files)}, layout.Root(tmp_path)) == {}


def test_snapshot_with_a_broken_link_is_not_used(tmp_path: Path, snapshot: Path) -> None:
    (snapshot.parent.parent / "blob").unlink()
    manifest = {"mine": model({"unet/model.safetensors": None})}
    assert cases.weights("tiny-sd", manifest, layout.Root(tmp_path)) == {}


def test_snapshot_of_a_later_entry_is_used_if_that_of_the_first_is_incomplete(tmp_path: Path, snapshot: Path) -> None:
    manifest = {"torn": model({"config.json": 99}), "whole": model({"config.json": 2})}
    assert cases.weights("tiny-sd", manifest, layout.Root(tmp_path)) == {"tiny-sd": str(snapshot)}


def test_model_that_extends_another_has_weights_only_if_both_are_complete(tmp_path: Path, snapshot: Path) -> None:
    manifest = {"control": model({"config.json": 2}, architecture="tiny-controlnet")}
    root = layout.Root(tmp_path)
    assert cases.weights("tiny-controlnet", manifest, root) == {}
    manifest["base"] = model({"config.json": 2})
    assert set(cases.weights("tiny-controlnet", manifest, root)) == {"tiny-controlnet", "tiny-sd"}


def test_shipped_manifest_has_the_models_of_the_quick_suite() -> None:
    manifest = toml.load_tables(layout.shipped_envs() / "models.toml", models_config.ModelSpec)
    assert {"ddpm-cat-256", "stable-diffusion-v1-5"} <= {entry.architecture for entry in manifest.values()} & set(
        models()
    )


SUITE_WITH_LOWER = """\
description = "the dtypes of the device"
budget = {cpu = 10, cuda = 20, mps = 30}
[[matrix]]
required = true
model = "tiny-ddpm"
dtype = ["fp32", "lower"]
scheduler = "ddim"
cpu = [{size = 32, steps = 2, lanes = 32}, {size = 16, steps = 2}]
gpu = {size = 64, steps = 2}

[[matrix]]
model = "tiny-ddpm"
dtype = ["fp32", "bf16", "fp16"]
scheduler = "ddim"
cpu = {size = 16, steps = 2}
"""


def unrolled(
    folder: Path, capabilities: cases.Capabilities, device: str = "cpu", **selection: Any
) -> list[tuple[str, int, bool]]:
    cells = cases.unroll(
        cases.load_suite(str(write_suite(folder, SUITE_WITH_LOWER))), device, capabilities=capabilities, **selection
    )
    return [(cell.case.dtype, cell.case.height, cell.required) for cell in cells]


def test_dtype_lower_becomes_the_preferred_low_precision_of_the_device(tmp_path: Path) -> None:
    cells = unrolled(tmp_path, cases.Capabilities("bf16", frozenset(["fp16"]), 16))
    assert cells == [("fp32", 16, True), ("bf16", 16, True)]


def test_suite_has_only_fp32_cases_on_a_device_without_low_precision(tmp_path: Path) -> None:
    assert unrolled(tmp_path, cases.Capabilities(None, frozenset(["bf16", "fp16"]), 16)) == [("fp32", 16, True)]


@pytest.mark.parametrize(
    ("device", "lanes", "size"), [("cpu", 16, 16), ("cpu", 32, 32), ("cpu", 512, 32), ("cpu", None, 32), ("mps", 1, 64)]
)
def test_first_shape_that_fits_the_device_is_used(tmp_path: Path, device: str, lanes: float | None, size: int) -> None:
    cells = unrolled(tmp_path, cases.Capabilities("bf16", frozenset(), lanes), device)
    assert ("fp32", size, True) in cells


def test_dtype_that_the_user_names_has_cases_even_without_kernels(tmp_path: Path) -> None:
    none = cases.Capabilities(None, frozenset(["bf16", "fp16"]), 16)
    assert unrolled(tmp_path, none, only_dtypes=["fp16"]) == [("fp16", 16, True)]
    assert unrolled(tmp_path, none, changes={"dtype": "fp16"}) == [("fp16", 16, True)]


def test_suite_of_which_the_device_supports_no_dtype_is_rejected(tmp_path: Path) -> None:
    text = SUITE_WITH_LOWER.replace('["fp32", "lower"]', '"tf32"').replace('["fp32", "bf16", "fp16"]', '"bf16"')
    suite = cases.load_suite(str(write_suite(tmp_path, text)))
    with pytest.raises(SpecError, match=r"cpu has no kernels for any dtype of this suite \(bf16, tf32\)"):
        cases.unroll(suite, "cpu", capabilities=cases.Capabilities(None, frozenset(["tf32", "bf16", "fp16"])))


def test_dtype_lower_is_rejected_outside_of_suite_files() -> None:
    with pytest.raises(SpecError, match="unknown dtype 'lower'"):
        cases.change(cases.default_case("tiny-ddpm", "cpu"), {"dtype": "lower"})


def test_zero_steps_are_rejected_with_the_name_of_the_axis() -> None:
    with pytest.raises(SpecError, match="steps=0"):
        cases.change(cases.default_case("tiny-ddpm", "cpu"), {"steps": "0"})


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
def test_quick_suite_requires_both_models_in_fp32_and_in_low_precision(device: str) -> None:
    cells = cases.unroll(
        cases.load_suite("quick"), device, capabilities=cases.Capabilities("bf16", frozenset(["fp16"]), 16)
    )
    required = [(cell.case.model, cell.case.dtype) for cell in cells if cell.required]
    models = ("ddpm-cat-256", "stable-diffusion-v1-5")
    assert sorted(required) == sorted((model, dtype) for model in models for dtype in ("fp32", "bf16"))
    assert [cell.required for cell in cells] == [True] * 4 + [False] * 2
