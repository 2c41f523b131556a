"""Suites: what is shipped, what a person may write, and where a case finds its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import cases
from bench.axes import DTYPES, SCHEDULERS, architecture, models
from provision import paths, spec
from provision.errors import SpecError

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
    assert {case.device for case in found} == {device}
    assert len({case.name for case in found}) == len(found), "two cases share a name, and so a picture"
    for case in found:
        assert case.scheduler in SCHEDULERS
        assert case.dtype in DTYPES
        assert case.height % architecture(case.model)["scale"] == 0


def test_the_suites_that_make_names_are_shipped() -> None:
    assert {"quick", "tiny"} <= set(cases.suites())


def test_a_suite_unrolls_in_the_order_of_its_file(suite: cases.Suite) -> None:
    found = cases.unroll(suite, "cpu")
    assert [(case.model, case.dtype, case.scheduler, case.layout) for case in found] == [
        ("tiny-sd", "fp32", "ddim", "contiguous"),
        ("tiny-sd", "fp32", "ddpm", "contiguous"),
        ("tiny-sd", "bf16", "ddim", "contiguous"),
        ("tiny-sd", "bf16", "ddpm", "contiguous"),
        ("tiny-ddpm", "fp16", "dpmpp-karras", "contiguous"),
        ("tiny-ddpm", "fp16", "dpmpp-karras", "channels_last"),
    ]


def test_every_cell_of_a_suite_has_its_own_name(suite: cases.Suite) -> None:
    # The name is also the picture's file: two cases of one name overwrite each other's.
    names = [case.name for case in cases.unroll(suite, "cpu")]
    assert len(set(names)) == len(names), names


@pytest.mark.parametrize(
    ("device", "shape"), [("cpu", (64, 64, 2, 1)), ("cuda:3", (128, 128, 9, 4)), ("mps", (128, 128, 9, 4))]
)
def test_each_kind_of_device_has_its_shape(suite: cases.Suite, device: str, shape: tuple[int, ...]) -> None:
    first = cases.unroll(suite, device)[0]
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
    assert [(case.model, case.dtype) for case in found] == expected


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
        ("batch = 4", "batsh = 4", 13, ["matrix.0.gpu.batsh", "unknown key", "batch"]),
        ('description = "two blocks"', 'descripton = "two"', 1, ["description"]),
        ("cuda = 20", 'cuda = "twenty"', 5, ["budget.cuda", "integer"]),
        ("mps = 30", "mps = 0", 6, ["budget.mps", "greater than 0"]),
        ('["fp32", "bf16"]', '["fp32", "fp8"]', 10, ["matrix.0.dtype.1", "'fp8'", "fp32, bf16, fp16"]),
        ('"tiny-sd"', '"tiny-sdxl"', 9, ["matrix.0.model", "'tiny-sdxl'", "tiny-sd", "ddpm-cat-256"]),
        ('["dpmpp-karras"]', '["euler"]', 18, ["matrix.1.scheduler.0", "'euler'", "dpmpp-karras"]),
        ('"channels_last"]', '"rows"]', 19, ["matrix.1.layout.1", "'rows'", "channels_last"]),
        ('dtype = ["fp16"]', "dtype = []", 17, ["matrix.1.dtype", "at least 1"]),
        ("size = 16", "size = 20", 20, ["matrix.1.cpu.size", "multiple of 8"]),
        ("steps = 7", "steps = 0", 21, ["matrix.1.gpu.steps"]),
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


def model(files: dict[str, int | None], architecture: str = "tiny-sd") -> spec.ModelSpec:
    return spec.ModelSpec(
        repo="someone/model",
        revision=REVISION,
        license="mit",
        architecture=architecture,
        files=[spec.ModelFile(path=path, size=size) for path, size in files.items()],
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
    root = paths.Root(tmp_path)
    assert cases.weights("tiny-sd", manifest, root) == snapshot
    assert cases.weights("ddpm-cat-256", manifest, root) is None


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
    assert cases.weights("tiny-sd", {"mine": model(files)}, paths.Root(tmp_path)) is None


def test_a_link_to_nothing_is_no_file(tmp_path: Path, snapshot: Path) -> None:
    (snapshot.parent.parent / "blob").unlink()
    manifest = {"mine": model({"unet/model.safetensors": None})}
    assert cases.weights("tiny-sd", manifest, paths.Root(tmp_path)) is None


def test_a_whole_snapshot_is_taken_where_an_earlier_one_is_not(tmp_path: Path, snapshot: Path) -> None:
    manifest = {"torn": model({"config.json": 99}), "whole": model({"config.json": 2})}
    assert cases.weights("tiny-sd", manifest, paths.Root(tmp_path)) == snapshot


def test_what_the_manifest_ships_is_what_suites_can_ask_for() -> None:
    manifest = spec.load_tables(paths.shipped_envs() / "models.toml", spec.ModelSpec)
    assert {"ddpm-cat-256", "stable-diffusion-v1-5"} <= {entry.architecture for entry in manifest.values()} & set(
        models()
    )
