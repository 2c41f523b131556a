"""Tests that no command ends with a traceback on a root of which one file is damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given

from tests.fuzz import kept_inputs, mutations
from tests.provision.fake_hub import git_sha1
from tests.provision.run_command import provision

if TYPE_CHECKING:
    from collections.abc import Callable

COMMIT = "a" * 40
REPO = "root/cache/huggingface/hub/models--me--tiny"
HOST = """relocate = ["huggingface", "pip", {path = "~/work", to = "work"}]
models = ["tiny"]
interpreter = "system"
mirror = {pip = "near", conda = "near", hf = "near"}
login = true
"""
MIRRORS = """[pip.near]
url = "http://127.0.0.1:9/simple"
[conda.near]
url = "http://127.0.0.1:9/c"
[hf.near]
url = "http://127.0.0.1:9"
"""
HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
FILES = {
    "model_index.json": b'{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}',
    "unet/config.json": b'{"_class_name": "UNet2DModel"}',
    "unet/diffusion_pytorch_model.safetensors": struct.pack("<Q", len(HEADER)) + HEADER + b"\0" * 8,
}
NAMES = {
    path: hashlib.sha256(content).hexdigest() if path.endswith("safetensors") else git_sha1(content)
    for path, content in FILES.items()
}
LOCAL = [["status", "--offline"], ["doctor"]]
MODELS = [["models", "list"], ["models", "verify", "tiny"], ["models", "show", "tiny"]]
# The damaged file, and the commands that read it. `*` stands for one name.
TARGETS: dict[str, list[list[str]]] = {
    "root/.firstlight/links.json": [*LOCAL, ["repair"], ["undo", "--dry-run"]],
    "root/.firstlight/volume.json": [*LOCAL, ["repair"]],
    "root/.firstlight/capabilities.json": LOCAL,
    "root/.firstlight/journal/*": [["undo", "--list"], ["undo", "--dry-run"], ["doctor"], ["gc"]],
    "root/.firstlight/mirrors.json": [*LOCAL, ["mirrors", "list"], ["repair"], ["mirrors", "restore"]],
    "root/.firstlight/variables/*.json": [["shellenv"], ["status", "--offline"]],
    "root/.firstlight/stand-ins.json": [["status", "--offline"], ["models", "list"]],
    "root/.firstlight/model-pins.json": [["status", "--offline"], *MODELS],
    "root/.firstlight/smoke.json": [["status", "--offline"]],
    "root/.firstlight/holder.json": [["repair"]],
    "home/.local/state/firstlight/roots.json": [*LOCAL, ["repair"]],
    "root/envs/diffusers/.firstlight.json": [["status", "--offline"], ["env", "list"], ["repair"]],
    "root/envs/diffusers/pyvenv.cfg": [["status", "--offline"], ["env", "list"]],
    "root/envs/diffusers/lib/*/site-packages/torch-*/RECORD": [
        ["status", "--offline"],
        ["verify", "--offline"],
        ["env", "list"],
        ["repair"],
    ],
    f"{REPO}/trees/{COMMIT}.json": [["status", "--offline"], ["repair"], *MODELS],
    f"{REPO}/refs/main": [["status", "--offline"], ["repair"], ["models", "list"]],
    f"{REPO}/blobs/{NAMES['model_index.json']}": MODELS,
    f"{REPO}/blobs/{NAMES['unet/config.json']}": MODELS,
    f"{REPO}/blobs/{NAMES['unet/diffusion_pytorch_model.safetensors']}": MODELS,
    "host.toml": LOCAL,
    "envs/models.toml": [["status", "--offline"], ["models", "list"]],
    "envs/mirrors.toml": [["status", "--offline"], ["mirrors", "list"]],
    "envs/torch.toml": [["status", "--offline"]],
    "envs/diffusers/cpu.lock": [["status", "--offline"], ["verify", "--offline"]],
    "home/.condarc": [["status", "--offline"], ["env", "list"], ["doctor"]],
    "home/.config/pip/pip.conf": [["status", "--offline"], ["repair"]],
    "home/.config/uv/uv.toml": [["status", "--offline"], ["repair"]],
    "home/.bashrc": [["status", "--offline"], ["repair"]],
}


@pytest.fixture
def kept(tmp_path: Path, envs: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a small host, and return the folder with a copy of it; the host is `tmp_path`."""
    monkeypatch.setenv("SHELL", "/bin/bash")
    (home / "work").mkdir()
    (home / "work/x").write_text("x")
    (tmp_path / "host.toml").write_text(HOST)
    (envs / "mirrors.toml").write_text(MIRRORS)
    rows = [f'{{path = "{path}", {_pin(path)}}}' for path in FILES]
    (envs / "models.toml").write_text(
        f'[tiny]\nrepo = "me/tiny"\nrevision = "{COMMIT}"\nlicense = "mit"\narchitecture = "tiny-ddpm"\n'
        f"files = [{', '.join(rows)}]\n"
    )
    shutil.copytree(Path(__file__).parents[2] / "envs/architectures", envs / "architectures")
    provision("setup", "--offline", *_flags(tmp_path))  # the model is absent, so the rest of the host is set up
    repo = tmp_path / REPO
    tree: dict[str, Any] = {}
    for path, content in FILES.items():
        _write(repo / "blobs" / NAMES[path], content)
        snapshot = repo / "snapshots" / COMMIT / path
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.symlink_to(os.path.relpath(repo / "blobs" / NAMES[path], snapshot.parent))
        tree[path] = {"size": len(content), "blob_id": NAMES[path][:40]}
    _write(repo / "refs/main", COMMIT.encode())
    _write(repo / "trees" / f"{COMMIT}.json", json.dumps({"format_version": 1, "files": tree}).encode())
    completed = provision("setup", "--offline", *_flags(tmp_path))
    assert completed.returncode == 0, completed.stdout + completed.stderr
    copy = tmp_path / "kept"
    copy.mkdir()
    _copy(tmp_path, copy)
    return copy


def _pin(path: str) -> str:
    kind = "sha256" if len(NAMES[path]) == 64 else "git_sha1"
    return f'size = {len(FILES[path])}, {kind} = "{NAMES[path]}"'


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link, or a hard link into a cache
    path.write_bytes(content)


def _copy(source: Path, target: Path) -> None:
    """Replace the parts of a host by those of another folder."""
    for name in ("root", "home", "envs", "host.toml"):
        if (source / name).is_dir():
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(source / name, target / name, symlinks=True)
        else:
            shutil.copy(source / name, target / name)


def _flags(host: Path) -> list[object]:
    return ["--root", host / "root", "--host", host / "host.toml", "--envs", host / "envs"]


def _run(host: Path, words: list[str]) -> None:
    flags = _flags(host)
    if words[0] in {"undo", "gc", "shellenv"} or words in (["env", "list"], ["mirrors", "restore"]):
        flags = flags[:4]
    completed = provision(*words, *flags)
    assert "Traceback" not in completed.stderr, completed.stderr
    assert completed.returncode in {0, 1, 2, 3, 4, 5}
    assert "No such option" not in completed.stderr, completed.stderr


@pytest.mark.parametrize("part", range(4))
def test_command_on_a_damaged_file_ends_without_a_traceback(kept: Path, tmp_path: Path, part: int) -> None:
    for place, commands in list(TARGETS.items())[part::4]:
        path = next(iter(sorted(kept.glob(place))), kept / place)
        sample = path.read_bytes() if path.exists() else b"a: [1]\nb = 1\n[c]\n"
        damage = _runs(kept, tmp_path, path.relative_to(kept), commands)
        for content in kept_inputs.COMMANDS.get(place, []):
            damage(content)
        inputs: Any = given(_damaged(path, sample))
        mutations.fuzzed(1)(inputs(damage))()


def _runs(kept: Path, host: Path, place: Path, commands: list[list[str]]) -> Callable[[bytes], None]:
    """Return a function that runs commands on a host, each with this content of the file, and restores the host."""

    def damage(content: bytes) -> None:
        for words in commands:
            _write(host / place, content)
            _run(host, words)
            if words[0] in {"repair", "undo", "gc", "mirrors"}:
                _copy(kept, host)
        _copy(kept, host)

    return damage


def _damaged(path: Path, sample: bytes) -> Any:
    if path.suffix == ".jsonl":
        return mutations.lines_of([json.loads(line) for line in sample.splitlines()])
    if path.suffix == ".json" and sample.startswith((b"{", b"[")):
        return mutations.json_of(json.loads(sample))
    return mutations.bytes_of(sample)
