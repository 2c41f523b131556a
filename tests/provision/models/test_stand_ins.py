"""Tests the files of stand-ins: layout, numbers and progress, after a kill, on a full disk, and in an older format."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from provision.core.errors import BlockedError, FirstlightError
from provision.core.layout import Root
from provision.models import architectures, safetensors, stand_ins
from tests.provision.tiny_pipelines import ENVS, model

if TYPE_CHECKING:
    from pathlib import Path

SHAPES: dict[str, list[Any]] = {
    "conv_in.weight": [40, 9, 3, 3],
    "conv_in.bias": [40],
    "norm.weight": [40],
    "position_ids": ["I64", 1, 7],
    "big.weight": [700, 300],
    "concept_embeds_weights": [17],
}
PARAMETERS = 40 * 81 + 80 + 210_000 + 17


@pytest.fixture
def envs(tmp_path: Path) -> Path:
    """Return a folder with the architecture of a flat UNet and its recorded description."""
    folder = tmp_path / "data"
    (folder / "architectures").mkdir(parents=True)
    definition = {
        "pipeline": "DDPMPipeline",
        "layout": "flat",
        "classes": {"unet": ["diffusers", "UNet2DModel"]},
        "parameters": {"unet": PARAMETERS},
        "unet": {"sample_size": 8},
        "native": {"class": "DDPMScheduler"},
    }
    (folder / "architectures/a.json").write_text(json.dumps(definition))
    unet = {"config": {"_class_name": "UNet2DModel", "sample_size": 8}, "tensors": SHAPES}
    description = {"diffusers": "0.1", "components": {"unet": unet}, "scheduler": {"_class_name": "DDPMScheduler"}}
    architectures.record(folder, architectures.load(folder, "a"), description)
    return folder


def build(root: Root, envs: Path, name: str = "a", *, variant: str | None = None) -> tuple[Path, list[tuple[int, int]]]:
    """Build a stand-in; return its snapshot, and the progress reports as (bytes, total)."""
    reports: list[tuple[int, int]] = []
    missing_python = root.path / "no python"
    return stand_ins.build(
        root, name, model("a", variant), envs, missing_python, lambda *report: reports.append(report)
    ), reports


def test_stand_in_with_a_recorded_description_is_built_without_an_environment(root: Root, envs: Path) -> None:
    snapshot, reports = build(root, envs)
    files = {path.name: path for path in snapshot.iterdir()}
    layout = {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "model_index.json",
        "scheduler_config.json",
    }
    assert set(files) == layout, "the files are those of the flat layout"
    assert all(path.resolve().name == hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values())
    tensors = safetensors.read_header(files["diffusion_pytorch_model.safetensors"])
    assert {name: [*tensor.shape] for name, tensor in tensors.items()} == {
        name: [size for size in shape if size != "I64"] for name, shape in SHAPES.items()
    }
    assert json.loads(files["config.json"].read_text())["_diffusers_version"] == "0.1"
    assert json.loads(files["model_index.json"].read_text())["unet"] == ["diffusers", "UNet2DModel"]
    assert sum(count for count, _ in reports) == files["diffusion_pytorch_model.safetensors"].stat().st_size
    assert {total for _, total in reports} == {2 * PARAMETERS}


def test_stand_in_has_random_weights_norms_of_one_and_a_safety_checker_that_flags_no_image(
    root: Root, envs: Path
) -> None:
    import numpy as np

    snapshot, _ = build(root, envs)
    content = (snapshot / "diffusion_pytorch_model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])

    def tensor(name: str) -> np.ndarray:
        first, last = header[name]["data_offsets"]
        kind = {"F16": "<f2", "I64": "<i8"}[header[name]["dtype"]]
        return np.frombuffer(content[begin + first : begin + last], kind).reshape(header[name]["shape"])

    assert tensor("position_ids").tolist() == [[*range(7)]]
    assert set(tensor("norm.weight")) == {1.0}
    assert set(tensor("conv_in.bias")) == {0.0}
    assert set(tensor("concept_embeds_weights")) == {2.0}, "the safety checker's cosines stay below the threshold 2"
    big = tensor("big.weight")
    assert len({row.tobytes() for row in big}) == 700, "no row repeats another"
    assert 0.9 < abs(big).max() * 300**0.5 <= 1.01
    assert abs(float(big.mean(dtype="f8"))) < 0.001


def test_stand_in_of_a_variant_has_its_own_repository_id_and_file_names(root: Root, envs: Path) -> None:
    snapshot, _ = build(root, envs, "a@fp16+x", variant="fp16")
    assert snapshot.parent.parent.name == "models--stand-in--a.fp16"
    assert (snapshot / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert stand_ins.snapshot_of(root, "a") is None


def test_stand_in_of_an_older_format_is_built_again(root: Root, envs: Path) -> None:
    snapshot, _ = build(root, envs)
    blobs = {path.relative_to(snapshot).as_posix(): path.readlink().name for path in snapshot.rglob("*")}
    old_revision = hashlib.sha256(json.dumps(blobs, sort_keys=True).encode()).hexdigest()[:40]
    snapshot.rename(snapshot.with_name(old_revision))
    (snapshot.parent.parent / "refs/main").write_text(old_revision)
    assert stand_ins.snapshot_of(root, "a") is None
    assert build(root, envs)[0] == snapshot


@pytest.mark.parametrize("path", ["unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_stand_in_with_an_empty_file_is_built_again(root: Root, envs: Path, path: str) -> None:
    """Empty a file, as a power cut may do."""
    snapshot, _ = build(root, envs)
    (file,) = snapshot.rglob(path.rpartition("/")[2])
    file.resolve().write_bytes(b"")
    assert stand_ins.snapshot_of(root, "a") is None
    rebuilt, _ = build(root, envs)
    assert (rebuilt / file.relative_to(snapshot)).stat().st_size > 0


def test_recorded_description_of_an_architecture_with_other_settings_is_not_used(root: Root, envs: Path) -> None:
    path = envs / "architectures/a.json"
    path.write_text(path.read_text().replace('"sample_size": 8', '"sample_size": 16'))
    with pytest.raises(
        FirstlightError, match=r"does not exist\. This interpreter is needed to build a stand-in .*`make setup`"
    ):
        build(root, envs)
    assert not list(root.hub.glob("*stand-in*"))


def test_build_of_a_stand_in_on_a_full_disk_is_blocked_and_leaves_no_files(
    small_disk: Path, envs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(small_disk)
    root.hub.mkdir(parents=True)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
    with pytest.raises(BlockedError, match="bytes are free"):
        build(root, envs)
    free = shutil.disk_usage(small_disk)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)  # another program uses the space meanwhile
    with pytest.raises(BlockedError, match="no space left"):
        build(root, envs)
    assert not list(root.hub.glob("*stand-in*"))


def test_interrupted_build_of_a_stand_in_leaves_no_files_and_deletes_those_of_a_killed_build(
    root: Root, envs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root.hub / ".firstlight-stand-in-a-killed/files").mkdir(parents=True)
    (root.hub / ".firstlight-stand-in-ab-other").mkdir()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stand_ins.build(root, "a", model("a"), envs, root.path, interrupt)
    assert [path.name for path in root.hub.glob(".firstlight-stand-in-a-*")] == []
    assert stand_ins.snapshot_of(root, "a") is None
    build(root, envs)
    assert [path.name for path in root.hub.glob(".firstlight-*")] == [".firstlight-stand-in-ab-other"]


def test_shipped_descriptions_have_the_parameter_counts_of_their_architectures() -> None:
    """Check the descriptions without which the first setup imports torch, transformers and diffusers."""
    for name in ("ddpm-cat-256", "stable-diffusion-v1-5"):
        architecture = architectures.load(ENVS, name)
        assert architecture.description is not None, (
            f"run: python -m provision.models.record_architecture PYTHON {name}"
        )
        for component, count in architecture.parameters.items():
            shapes = architecture.description["components"][component]["tensors"]
            assert sum(math.prod(shape) for shape in shapes.values()) == count
