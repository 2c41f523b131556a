"""Suites: what is shipped, what a person may write, and where a case finds its weights."""

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
    return cases.load_suite(str(written(tmp_path, SUITE)))


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", cases.suites())
@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
def test_every_shipped_suite_loads_and_unrolls(name: str, device: str) -> None:
    suite = cases.load_suite(name)
    found = cases.unroll(suite, device)
    assert suite.description
    assert {cell.case.device for cell in found} == {device}
    assert len({cell.case.name for cell in found}) == len(found), "two cases share a name, and so a picture"
    for case in (cell.case for cell in found):
        assert case.scheduler in SCHEDULERS
        assert case.dtype in DTYPES
        assert case.height % architecture(case.model)["scale"] == 0


def test_the_suites_that_make_names_are_shipped() -> None:
    assert {"quick", "tiny", "sampling", "schedulers", "precision", "memory", "pipelines", "full"} == set(
        cases.suites()
    )


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_full_suite_holds_every_other_once(device: str) -> None:
    whole = {cell.case for cell in cases.unroll(cases.load_suite("full"), device)}
    for name in set(cases.suites()) - {"full", "tiny"}:
        assert {cell.case for cell in cases.unroll(cases.load_suite(name), device)} <= whole


def test_every_scheduler_is_in_the_suite_of_schedulers() -> None:
    for device in ("cpu", "cuda:0"):
        found = cases.unroll(cases.load_suite("schedulers"), device)
        assert {cell.case.scheduler for cell in found} == set(SCHEDULERS)


def test_a_suite_that_includes_itself_is_told(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    budget = "[budget]\ncpu = 1\ncuda = 1\nmps = 1\n"
    mine.write_text(f'description = "a ring"\ninclude = "{mine}"\n{budget}')
    with pytest.raises(SpecError, match="includes itself"):
        cases.load_suite(str(mine))
    mine.write_text(f'description = "nothing"\n{budget}')
    with pytest.raises(SpecError, match="has no block"):
        cases.load_suite(str(mine))


def test_an_axis_is_one_value_or_a_list(tmp_path: Path) -> None:
    text = SUITE.replace('"tiny-sd"', '["tiny-sd", "tiny-sdxl"]').replace("steps = 2", "steps = [2, 4], batch = [1, 2]")
    text = text.replace('["fp32", "bf16"]', '"bf16"').replace('["ddim", "ddpm"]', '"ddim"')
    found = cases.unroll(cases.load_suite(str(written(tmp_path, text))), "cpu")
    assert [(cell.case.model, cell.case.steps, cell.case.batch) for cell in found[:8]] == [
        (name, steps, batch) for name in ("tiny-sd", "tiny-sdxl") for steps in (2, 4) for batch in (1, 2)
    ]


def test_a_block_without_a_shape_is_left_out_on_that_device(tmp_path: Path) -> None:
    text = SUITE.replace("gpu = {size = 128, steps = 9, batch = 4}\n", "find_max = true\n")
    suite = cases.load_suite(str(written(tmp_path, text)))
    assert {cell.case.model for cell in cases.unroll(suite, "cuda:0")} == {"tiny-ddpm"}
    assert {cell.case.model: cell.find_max for cell in cases.unroll(suite, "cpu")} == {
        "tiny-sd": True,
        "tiny-ddpm": False,
    }


def test_a_case_is_changed_by_axes_as_suites_name_them(suite: cases.Suite) -> None:
    case = cases.unroll(suite, "cpu")[0].case
    changed = cases.change(case, {"dtype": "bf16", "size": "128", "steps": "7", "layout": "channels_last"})
    assert changed == replace(case, dtype="bf16", height=128, width=128, steps=7, layout="channels_last")
    assert cases.change(case, {}) == case
    assert cases.change(case, {"task": "image-to-image"}).task == "image-to-image"
    assert cases.unroll(suite, "cpu", changes={"threads": "3"})[0].case.threads == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": "fp8"}, "dtype=fp8: unknown dtype 'fp8'; there is: fp64, fp32"),
        ({"colour": "red"}, "unknown axis 'colour'; there is: attention, batch"),
        ({"size": "7"}, "size=7: Input should be a multiple of 8"),
        ({"task": "inpainting"}, "tiny-sd cannot do inpainting; there is: text-to-image, image-to-image"),
    ],
)
def test_a_change_that_cannot_be_is_told(suite: cases.Suite, changes: dict[str, str], told: str) -> None:
    with pytest.raises(SpecError) as caught:
        cases.change(cases.unroll(suite, "cpu")[0].case, changes)
    assert told in str(caught.value)


def test_a_suite_unrolls_in_the_order_of_its_file(suite: cases.Suite) -> None:
    found = cases.unroll(suite, "cpu")
    assert [(cell.case.model, cell.case.dtype, cell.case.scheduler, cell.case.layout) for cell in found] == [
        ("tiny-sd", "fp32", "ddim", "contiguous"),
        ("tiny-sd", "fp32", "ddpm", "contiguous"),
        ("tiny-sd", "bf16", "ddim", "contiguous"),
        ("tiny-sd", "bf16", "ddpm", "contiguous"),
        ("tiny-ddpm", "fp16", "dpmpp-karras", "contiguous"),
        ("tiny-ddpm", "fp16", "dpmpp-karras", "channels_last"),
    ]


def test_every_cell_of_a_suite_has_its_own_name(suite: cases.Suite) -> None:
    # The name is also the picture's file: two cases of one name overwrite each other's.
    names = [cell.case.name for cell in cases.unroll(suite, "cpu")]
    assert len(set(names)) == len(names), names


@pytest.mark.parametrize(
    ("device", "shape"), [("cpu", (64, 64, 2, 1)), ("cuda:3", (128, 128, 9, 4)), ("mps", (128, 128, 9, 4))]
)
def test_each_kind_of_device_has_its_shape(suite: cases.Suite, device: str, shape: tuple[int, ...]) -> None:
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
def test_cases_can_be_picked(
    suite: cases.Suite, only_models: list[str], only_dtypes: list[str], expected: list[tuple[str, str]]
) -> None:
    found = cases.unroll(suite, "cpu", only_models=only_models, only_dtypes=only_dtypes)
    assert [(cell.case.model, cell.case.dtype) for cell in found] == expected


def test_nothing_left_is_told(suite: cases.Suite) -> None:
    with pytest.raises(SpecError, match="no case"):
        cases.unroll(suite, "cpu", only_models=["tiny-sd"], only_dtypes=["fp16"])


def test_an_unknown_suite_lists_what_there_is() -> None:
    with pytest.raises(SpecError) as caught:
        cases.load_suite("quikc")
    assert "'quikc'" in str(caught.value)
    for name in cases.suites():
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("only_models", "only_dtypes", "unknown", "listed"),
    [(["dalle"], [], "model 'dalle'", models()), ([], ["fp8"], "dtype 'fp8'", list(DTYPES))],
)
def test_an_unknown_pick_lists_what_there_is(
    suite: cases.Suite, only_models: list[str], only_dtypes: list[str], unknown: str, listed: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        cases.unroll(suite, "cpu", only_models=only_models, only_dtypes=only_dtypes)
    assert unknown in str(caught.value)
    for name in listed:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
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
def test_a_wrong_suite_is_told_by_file_line_and_key(
    tmp_path: Path, old: str, new: str, line: int, told: list[str]
) -> None:
    assert SUITE.count(old) == 1
    file = written(tmp_path, SUITE.replace(old, new))
    with pytest.raises(SpecError) as caught:
        cases.load_suite(str(file))
    message = str(caught.value)
    assert message.startswith(f"{file}, line {line}, key ")
    for words in told:
        assert words in message


def test_a_suite_file_that_is_not_there_or_no_toml_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is not there"):
        cases.load_suite(str(tmp_path / "absent.toml"))
    with pytest.raises(SpecError, match="not valid TOML"):
        cases.load_suite(str(written(tmp_path, "description = \n")))


def model(files: dict[str, int | None], architecture: str = "tiny-sd") -> models_config.ModelSpec:
    return models_config.ModelSpec(
        repo="someone/model",
        revision=REVISION,
        license="mit",
        architecture=architecture,
        files=[models_config.ModelFile(path=path, size=size) for path, size in files.items()],
    )


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot as the hub's cache keeps it: links into a folder of blobs."""
    folder = tmp_path / "cache" / "huggingface" / "hub" / "models--someone--model" / "snapshots" / REVISION
    (folder / "unet").mkdir(parents=True)
    blob = folder.parent.parent / "blob"
    blob.write_bytes(b"12345")
    (folder / "unet" / "model.safetensors").symlink_to(blob)
    (folder / "config.json").write_bytes(b"{}")
    return folder


def test_a_whole_snapshot_is_found(tmp_path: Path, snapshot: Path) -> None:
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
def test_a_snapshot_that_is_not_whole_is_not_taken(
    tmp_path: Path, snapshot: Path, files: dict[str, int | None]
) -> None:
    assert cases.weights("tiny-sd", {"mine": model(files)}, layout.Root(tmp_path)) == {}


def test_a_link_to_nothing_is_no_file(tmp_path: Path, snapshot: Path) -> None:
    (snapshot.parent.parent / "blob").unlink()
    manifest = {"mine": model({"unet/model.safetensors": None})}
    assert cases.weights("tiny-sd", manifest, layout.Root(tmp_path)) == {}


def test_a_whole_snapshot_is_taken_where_an_earlier_one_is_not(tmp_path: Path, snapshot: Path) -> None:
    manifest = {"torn": model({"config.json": 99}), "whole": model({"config.json": 2})}
    assert cases.weights("tiny-sd", manifest, layout.Root(tmp_path)) == {"tiny-sd": str(snapshot)}


def test_a_model_that_extends_another_needs_both(tmp_path: Path, snapshot: Path) -> None:
    manifest = {"control": model({"config.json": 2}, architecture="tiny-controlnet")}
    root = layout.Root(tmp_path)
    assert cases.weights("tiny-controlnet", manifest, root) == {}
    manifest["base"] = model({"config.json": 2})
    assert set(cases.weights("tiny-controlnet", manifest, root)) == {"tiny-controlnet", "tiny-sd"}


def test_what_the_manifest_ships_is_what_suites_can_ask_for() -> None:
    manifest = toml.load_tables(layout.shipped_envs() / "models.toml", models_config.ModelSpec)
    assert {"ddpm-cat-256", "stable-diffusion-v1-5"} <= {entry.architecture for entry in manifest.values()} & set(
        models()
    )


LOWER = """\
description = "what the device has kernels for"
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


def unrolled(folder: Path, means: cases.Capabilities, device: str = "cpu", **picks: Any) -> list[tuple[str, int, bool]]:
    found = cases.unroll(cases.load_suite(str(written(folder, LOWER))), device, means=means, **picks)
    return [(cell.case.dtype, cell.case.height, cell.required) for cell in found]


def test_lower_is_the_precision_of_the_device(tmp_path: Path) -> None:
    found = unrolled(tmp_path, cases.Capabilities("bf16", frozenset(["fp16"]), 16))
    assert found == [("fp32", 16, True), ("bf16", 16, True)]


def test_a_device_without_a_lower_precision_has_fp32_alone(tmp_path: Path) -> None:
    assert unrolled(tmp_path, cases.Capabilities(None, frozenset(["bf16", "fp16"]), 16)) == [("fp32", 16, True)]


@pytest.mark.parametrize(
    ("device", "lanes", "size"), [("cpu", 16, 16), ("cpu", 32, 32), ("cpu", 512, 32), ("cpu", None, 32), ("mps", 1, 64)]
)
def test_the_first_shape_that_fits_is_taken(tmp_path: Path, device: str, lanes: float | None, size: int) -> None:
    found = unrolled(tmp_path, cases.Capabilities("bf16", frozenset(), lanes), device)
    assert ("fp32", size, True) in found


def test_a_dtype_that_is_named_is_tried_without_kernels(tmp_path: Path) -> None:
    none = cases.Capabilities(None, frozenset(["bf16", "fp16"]), 16)
    assert unrolled(tmp_path, none, only_dtypes=["fp16"]) == [("fp16", 16, True)]
    assert unrolled(tmp_path, none, changes={"dtype": "fp16"}) == [("fp16", 16, True)]


def test_a_suite_without_a_dtype_of_the_device_is_one_clear_error(tmp_path: Path) -> None:
    text = LOWER.replace('["fp32", "lower"]', '"tf32"').replace('["fp32", "bf16", "fp16"]', '"bf16"')
    suite = cases.load_suite(str(written(tmp_path, text)))
    with pytest.raises(SpecError, match=r"cpu has no kernels for any dtype of this suite \(bf16, tf32\)"):
        cases.unroll(suite, "cpu", means=cases.Capabilities(None, frozenset(["tf32", "bf16", "fp16"])))


def test_lower_is_a_word_of_suites_alone() -> None:
    with pytest.raises(SpecError, match="unknown dtype 'lower'"):
        cases.change(cases.usual("tiny-ddpm", "cpu"), {"dtype": "lower"})


def test_a_wrong_step_is_told_by_its_axis() -> None:
    with pytest.raises(SpecError, match="steps=0"):
        cases.change(cases.usual("tiny-ddpm", "cpu"), {"steps": "0"})


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
def test_quick_measures_both_models_in_both_precisions_first(device: str) -> None:
    cells = cases.unroll(cases.load_suite("quick"), device, means=cases.Capabilities("bf16", frozenset(["fp16"]), 16))
    required = [(cell.case.model, cell.case.dtype) for cell in cells if cell.required]
    models = ("ddpm-cat-256", "stable-diffusion-v1-5")
    assert sorted(required) == sorted((model, dtype) for model in models for dtype in ("fp32", "bf16"))
    assert [cell.required for cell in cells] == [True] * 4 + [False] * 2
