"""Tests the checks of a model's files (headers, sizes, hashes), and the paths that a manifest may have."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provision.config.models import ModelFile
from provision.core.errors import SpecError
from provision.models import manifest, safetensors, verify
from provision.models.verify import Depth

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, header: dict[str, Any], data: bytes) -> Path:
    """Write a safetensors file with a header and data, and return its path."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    """Return the entry of a tensor in a safetensors header; `begin` and `end` are offsets in the data, in bytes."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_valid_safetensors_header_is_read(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": tensor(8, 12, [2], "F16"),
        "a": tensor(0, 8, [2]),
        "s": tensor(12, 12, [0]),
    }
    tensors = safetensors.read_header(write(tmp_path / "w", header, bytes(12)))
    assert (tensors["a"].elements, tensors["b"].dtype, tensors["s"].elements) == (2, "F16", 0)


def test_header_of_a_file_that_the_real_safetensors_library_wrote_is_read(
    tmp_path: Path, measured_python: Path
) -> None:
    script = (
        "import sys, numpy as np; from safetensors.numpy import save_file\n"
        "save_file({'x': np.zeros((2, 3), 'float16'), 'y': np.zeros((), 'int64')}, sys.argv[1])\n"
    )
    subprocess.run([str(measured_python), "-c", script, str(tmp_path / "w")], check=True)
    tensors = safetensors.read_header(tmp_path / "w")
    assert (tensors["x"].shape, tensors["y"].shape, tensors["y"].dtype) == ((2, 3), (), "I64")


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": tensor(0, 8, [2])}, bytes(4), "has 4 bytes of tensors, but its header declares 8 bytes"),
        ({"a": tensor(0, 8, [2])}, bytes(12), "has 12 bytes of tensors"),
        (
            {"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])},
            bytes(12),
            "has the tensor b, whose data starts inside the previous tensor",
        ),
        ({"a": tensor(4, 12, [2])}, bytes(12), "has the tensor a, whose data starts after a gap"),
        ({"a": tensor(0, 8, [3])}, bytes(8), "whose number of bytes does not match its shape"),
        ({"\x1b[2J": tensor(0, 8, [3])}, bytes(8), r"has the tensor '\\x1b\[2J', whose"),
        ({"\ud800": tensor(4, 12, [2])}, bytes(12), r"has the tensor '\\ud800', whose data starts after a gap"),
        ({"a": tensor(0, 8, [2], "Q9")}, bytes(8), "has an invalid header"),
        ({"a": tensor(0, 8, [-2])}, bytes(8), "has an invalid header"),
        ({"a": {"dtype": "F32"}}, bytes(8), "has an invalid header"),
        ({"a": 7}, bytes(8), "has an invalid header"),
    ],
)
def test_invalid_safetensors_header_is_rejected_with_the_reason(
    tmp_path: Path, header: dict[str, Any], data: bytes, reason: str
) -> None:
    with pytest.raises(safetensors.WeightsError, match=reason):
        safetensors.read_header(write(tmp_path / "w", header, data))


def test_safetensors_header_above_the_length_limit_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "w"
    for length, reason in (
        (6_000_001, "has a header of 6,000,001 bytes, more than the limit of 6,000,000"),
        (1 << 62, "longer"),
    ):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        if length < 1 << 30:
            os.truncate(path, 8 + length)
        with pytest.raises(safetensors.WeightsError, match=reason):
            safetensors.read_header(path)


def test_reading_the_longest_allowed_header_needs_less_than_150_mib_of_memory(tmp_path: Path) -> None:
    rows = {f"t{number:07}": tensor(0, 0, [0]) for number in range(85_000)}
    path = write(tmp_path / "w", rows, b"")
    assert 5_000_000 < path.stat().st_size < 6_000_000
    script = (
        "import re, sys; from pathlib import Path; from provision.models import safetensors as weights\n"
        "assert len(weights.read_header(Path(sys.argv[1]))) == 85_000\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text()).group(1))\n"
    )
    completed = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True)
    assert int(completed.stdout) / 1024 < 150


@given(st.binary(max_size=200))
def test_random_bytes_instead_of_a_header_raise_no_error_but_weights_error(content: bytes) -> None:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w"
        path.write_bytes(content)
        try:
            safetensors.read_header(path)
        except safetensors.WeightsError:
            return
        assert len(content) >= 8


def test_each_verification_depth_detects_its_kind_of_fault(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", {"a": tensor(0, 8, [2])}, bytes(8))
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    size = good.stat().st_size

    def state(depth: Depth, **pins: Any) -> str:
        return verify.check_files(tmp_path, [ModelFile(path="good.safetensors", **pins)], depth)[0].state

    assert [state(depth, size=size, sha256=digest) for depth in Depth] == ["ok"] * 3
    assert state(Depth.SIZE, size=size + 1) == "corrupt"
    assert state(Depth.SIZE, size=size, sha256="0" * 64) == "ok"
    assert state(Depth.HASH, size=size, sha256="0" * 64) == "corrupt"
    content = bytearray(good.read_bytes())
    content[9] ^= 0xFF
    good.write_bytes(content)
    assert [state(depth, size=size, sha256=digest) for depth in Depth] == ["ok", "corrupt", "corrupt"]
    good.unlink()
    assert state(Depth.HASH) == "missing"
    good.mkdir()
    assert state(Depth.SIZE) == "corrupt"


def test_verification_returns_the_states_in_the_order_of_the_files(tmp_path: Path) -> None:
    names = [f"{number}.json" for number in range(20)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(number * 100))
    states = verify.check_files(tmp_path, [ModelFile(path=name) for name in names], Depth.HASH)
    assert [state.path for state in states] == names


ENTRY = '[m]\nrepo = "o/m"\nrevision = "{}"\nlicense = "mit"\narchitecture = "x"\nfiles = [{}]\n'


def entry(*paths: str, extra: str = "") -> str:
    """Return a manifest entry with these files as TOML; `extra` is appended."""
    rows = ", ".join(f"{{path = {json.dumps(path)}}}" for path in paths)
    return ENTRY.format("a" * 40, rows) + extra


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["a.bin"], "can carry code"),
        (["a.CKPT"], "can carry code"),
        (["unet/a.pt"], "can carry code"),
        (["a.pkl"], "can carry code"),
        (["a.msgpack"], "can carry code"),
        (["pipeline.py"], "can carry code"),
        ([".py"], "can carry code"),
        (["unet/.pkl"], "can carry code"),
        ([".gitattributes"], "can carry code"),
        (["x.json "], "can carry code"),
        (["x.py."], "can carry code"),
        (["LICENSE."], "can carry code"),
        (["LICENSE "], "can carry code"),
        (["unet./x.json"], "can carry code"),
        (["x.json.py"], "can carry code"),
        (["x.so"], "can carry code"),
        (["x.onnx"], "can carry code"),
        (["x.npz"], "can carry code"),
        (["x.png"], "can carry code"),
        (["/etc/passwd"], "plain relative"),
        (["../x.json"], "plain relative"),
        (["a/../x.json"], "plain relative"),
        (["a//x.json"], "plain relative"),
        (["a\\x.json"], "plain relative"),
        (["a\nb.json"], "plain relative"),
        (["."], "plain relative"),
        (["x.json", "x.json"], "listed twice"),
        (["x.json", "X.json"], "only in case"),
        (["unet/a.json", "UNET/b.json"], "only in case"),
        (["\u00e9.json", "e\u0301.json"], "only in case"),
        (["unet", "unet/a.json"], "listed twice"),
        (["unet/a.json", "unet"], "listed twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else " and ".join(value),
)
def test_manifest_with_dangerous_or_colliding_file_paths_is_refused(
    tmp_path: Path, paths: list[str], reason: str
) -> None:
    (tmp_path / "models.toml").write_text(entry(*paths))
    with pytest.raises(SpecError, match=reason):
        manifest.load(tmp_path / "models.toml")


def test_manifest_with_weights_configuration_and_text_files_is_accepted(tmp_path: Path) -> None:
    suffixes = ("safetensors", "json", "txt", "model", "md", "jinja", "yaml", "yml", "bpe", "vocab")
    paths = ["LICENSE", "a.b/NOTICE", "x.safetensors.index.json", *(f"{suffix}/x.{suffix}" for suffix in suffixes)]
    paths.append("CONFIG.JSON")
    (tmp_path / "models.toml").write_text(entry(*paths))
    assert [file.path for file in manifest.load(tmp_path / "models.toml").pick("m").files] == paths


def test_extra_of_a_model_adds_its_files_and_an_unknown_extra_is_rejected(tmp_path: Path) -> None:
    extra = 'extras.checker = [{path = "checker/a.json"}]\n'
    (tmp_path / "models.toml").write_text(entry("unet/a.json", "b.json", extra=extra))
    models = manifest.load(tmp_path / "models.toml")
    assert [file.path for file in models.pick("m").files] == ["unet/a.json", "b.json"]
    assert [file.path for file in models.pick("m+checker").files] == ["unet/a.json", "b.json", "checker/a.json"]
    with pytest.raises(SpecError, match="unknown extra of m 'x'; available: checker"):
        models.pick("m+x")
    (tmp_path / "models.toml").write_text(entry("a.json", extra='extras.checker = [{path = "A.json"}]\n'))
    with pytest.raises(SpecError, match="only in case"):
        manifest.load(tmp_path / "models.toml")


def test_users_manifest_adds_models_and_an_invalid_name_in_it_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(entry("a.json"))
    (tmp_path / "mine.toml").write_text(entry("b.json").replace("[m]", "[mine]"))
    assert set(manifest.load(tmp_path / "models.toml", str(tmp_path / "mine.toml")).models) == {"m", "mine"}
    (tmp_path / "mine.toml").write_text(entry("b.json").replace("[m]", '["a+b"]'))
    with pytest.raises(SpecError, match="the name of an entry is NAME or NAME@VARIANT, of letters, digits"):
        manifest.load(tmp_path / "models.toml", str(tmp_path / "mine.toml"))


class TestNames:
    """Tests that a name of 40 characters counts as a hash only if it is hexadecimal and the name of a blob."""

    NAME = "diffusion_pytorch_model.fp16.safetensors"

    @pytest.mark.parametrize("is_link", [False, True])
    def test_file_name_of_40_characters_that_are_not_hexadecimal_is_not_taken_for_a_hash(
        self, tmp_path: Path, is_link: bool
    ) -> None:
        header = json.dumps({"a": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}).encode()
        blob = tmp_path / "blobs" / self.NAME if is_link else tmp_path / self.NAME
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        if is_link:
            (tmp_path / self.NAME).symlink_to(blob)
        assert [state.state for state in verify.check_files(tmp_path, [ModelFile(path=self.NAME)], Depth.HASH)] == [
            "ok"
        ]

    def test_hexadecimal_name_of_a_file_that_is_not_a_blob_is_not_taken_for_its_hash(self, tmp_path: Path) -> None:
        (tmp_path / ("a" * 40)).write_bytes(b"x")
        assert [state.state for state in verify.check_files(tmp_path, [ModelFile(path="a" * 40)], Depth.HASH)] == ["ok"]
